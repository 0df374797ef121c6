"""A job and the groups of its cluster: labels that no group has, and more than the groups may become."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.check.autoscaling import started_pods
from cluster.check.entrypoints import job_configs, path_problems
from cluster.check.kuberay import containers_of, groups_of
from cluster.check.problem import Place, Problem, mapping
from ray_diffsynth.cluster.demand import Demand, amounts
from ray_diffsynth.cluster.encoders import encoder_demand, encoder_pools
from ray_diffsynth.cluster.labels import described, matches
from ray_diffsynth.cluster.nodes import Cluster
from ray_diffsynth.cluster.workers import worker_group
from ray_diffsynth.config import JobConfig, PreprocessConfig, TrainConfig
from ray_diffsynth.config.cluster import ClusterConfig


def demand_of(config: JobConfig) -> Demand:
    """What a job asks of a cluster in which no worker is up."""
    if isinstance(config, PreprocessConfig):
        groups = list(config.pools or {"every group": {}})
        pools = encoder_pools(config, groups, Cluster({}), growing=True)
        return encoder_demand(pools, {name: pool.max_actors for name, pool in pools.items()}, least=True)
    if isinstance(config, TrainConfig):
        return worker_group(config, Cluster({}), growing=True).demand()
    return Demand()


def demand_problems(entrypoint: str, place: Place, cluster: Mapping[str, Any]) -> Iterator[Problem]:
    """What the entrypoint wants and no group of its cluster (a RayCluster's `spec`) has."""
    workers = [mapping(group) for group in cluster.get("workerGroupSpecs") or ()]
    for config in job_configs(entrypoint) if workers else ():
        yield from _demand_problems(config, place, cluster, [mapping(group.get("labels")) for group in workers])


def _demand_problems(
    config: JobConfig, place: Place, cluster: Mapping[str, Any], labels: Sequence[Mapping[str, str]]
) -> Iterator[Problem]:
    selector = config.selector if isinstance(config, ClusterConfig) else {}
    if not any(matches(found, selector) for found in labels):
        message = f"{config.job}: no group is one{described(selector)}; the groups have {json.dumps(labels)}"
        yield Problem(place, f"{message}; change --node_labels, or the labels of a group")
        return
    most = demand_of(config)
    least = Demand(tuple(replace(ask, most=ask.least) for ask in most.asks))
    if not _can_be(cluster, least):
        message = f"needs {_listed(least)}{described(selector)}, and the groups cannot become that"
        yield Problem(place, f"{config.job}: {message}; raise maxReplicas or a pod's resources, or lower --num_workers")
    elif not _can_be(cluster, most):
        message = (
            f"asks for {_listed(most)}{described(selector)}, more than the groups may become, and Ray's autoscaler"
        )
        fix = "raise maxReplicas, or lower --num_workers"
        yield Problem(place, f"{config.job}: {message} starts none of them until the job asks for less; {fix}")
    elif not selector and len({tuple(sorted(found.items())) for found in labels}) > 1:
        message = "names no machines, and Ray would take those of any group; add --node_labels"
        yield Problem(place, f"{config.job}: {message}, e.g. '{json.dumps(dict(labels[0]))}'")


def _can_be(cluster: Mapping[str, Any], demand: Demand) -> bool:
    return not started_pods(cluster, demand.bundles(), demand.selectors()).refused


def _listed(demand: Demand) -> str:
    return ", ".join(f"{ask.most} times {amounts(ask.process.resources)}" for ask in demand.asks)


def shared_path_problems(entrypoint: str, place: Place, cluster: Mapping[str, Any]) -> Iterator[Problem]:
    """Paths of the entrypoint that not every pod has on the same volume."""
    found = [_volumes_of(group) for _, group in groups_of(cluster, ())]
    yield from path_problems(entrypoint, place, sorted({path for path, _ in set.intersection(*found)}))


def _volumes_of(group: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(path, volume as JSON) of all that lasts longer than a pod in the container of Ray."""
    pod = mapping(mapping(group.get("template")).get("spec"))
    kinds = {}
    for volume in map(mapping, pod.get("volumes") or ()):
        kinds[volume.get("name")] = {key: value for key, value in volume.items() if key != "name"}
    found = set()
    for mount in map(mapping, next(iter(containers_of(group)), {}).get("volumeMounts") or ()):
        volume = kinds.get(mount.get("name"), {})
        if "emptyDir" not in volume:
            found.add((str(mount.get("mountPath")), json.dumps([volume, mount.get("subPath")], sort_keys=True)))
    return found
