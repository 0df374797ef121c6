"""Which pods a job's demand would start, by Ray's own scheduler on the autoscaling configuration of each manifest."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.check.autoscaling import Started, started_pods
from cluster.check.entrypoints import job_configs
from cluster.check.groups import demand_of
from ray_diffsynth.cluster.encoders import scan_demand
from ray_diffsynth.cluster.nodes import Cluster
from ray_diffsynth.config import PreprocessConfig
from tests.cluster_files.manifests import FILES, cluster_of, job_of, read

BOTH = [name for name in FILES if len(cluster_of(read(name))["workerGroupSpecs"]) == 2]
"""The files with both groups, where the wrong one could start."""
ENCODE, TRAIN = '\'{"stage": "encode"}\'', '\'{"stage": "train"}\''
PREPROCESS = "ray-diffsynth preprocess --model m/m --dataset_base_path /shared/d --output_path /shared/c"
FIT = "ray-diffsynth train --model m/m --dataset_base_path /shared/c --output_path /shared/o"


def started(name: str, command: str) -> Started:
    (config,) = job_configs(command)
    demand = demand_of(config)
    return started_pods(cluster_of(read(name)), demand.bundles(), demand.selectors())


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_encoding_starts_pods_that_encode_and_no_others(name: str, gpus: int) -> None:
    for workers in (str(gpus), f"1..{gpus}"):
        command = f"{PREPROCESS} --num_workers {workers} --node_labels {ENCODE}"
        assert started(name, command) == Started({"encode": gpus}, refused=False)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("gpus", "pods"), [(1, 1), (4, 1), (8, 1), (9, 2), (32, 4)])
def test_training_starts_pods_that_train_and_no_others(name: str, gpus: int, pods: int) -> None:
    command = f"{FIT} --num_workers {gpus} --node_labels {TRAIN}"
    assert started(name, command) == Started({"train": pods}, refused=False)


@pytest.mark.parametrize("name", BOTH)
def test_without_labels_it_is_the_packing_that_decides(name: str) -> None:
    """So the jobs name their machines: eight encoders would lie on one training node, and a scan on an encoding one."""
    assert started(name, f"{PREPROCESS} --num_workers 8").pods == {"train": 1}
    assert started(name, f"{FIT} --num_workers 1").pods == {"encode": 1}


@pytest.mark.parametrize("name", BOTH)
def test_reading_headers_starts_a_pod_that_encodes(name: str) -> None:
    (config,) = job_configs(f"{PREPROCESS} --node_labels {ENCODE}")
    assert isinstance(config, PreprocessConfig)
    demand = scan_demand(config, Cluster({}))
    for tasks in (False, True):
        found = started_pods(cluster_of(read(name)), demand.bundles(), demand.selectors(), tasks=tasks)
        assert found == Started({"encode": 1}, refused=False)


@pytest.mark.parametrize("name", BOTH)
def test_a_demand_beyond_the_maximum_starts_nothing_and_the_queue_starts_what_it_can(name: str) -> None:
    """What is asked for is met as a whole; tasks and actors that wait are placed one by one."""
    cluster = cluster_of(read(name))
    bundles: list[dict[str, float]] = [{"GPU": 1.0}] * 17
    labels = [{"stage": "encode"}] * 17
    assert started_pods(cluster, bundles, labels) == Started({}, refused=True)
    assert started_pods(cluster, bundles, labels, tasks=True) == Started({"encode": 16}, refused=True)


@pytest.mark.parametrize(
    ("condition", "pods"),
    [
        ("encode", {"encode": 1}),
        ("!encode", {"train": 1}),
        ("in(x, train)", {"train": 1}),
        ("!in(x, train)", {"encode": 1}),
    ],
)
def test_conditions_mean_what_ray_means(condition: str, pods: dict[str, int]) -> None:
    found = started_pods(cluster_of(read("raycluster.yaml")), [{"GPU": 1.0}], [{"stage": condition}])
    assert found == Started(pods, refused=False)


@pytest.mark.parametrize("name", FILES)
def test_nothing_starts_that_nobody_asks_for(name: str) -> None:
    fixed: dict[str, int] = {
        group["groupName"]: group["minReplicas"]
        for group in cluster_of(read(name))["workerGroupSpecs"]
        if group["minReplicas"]
    }
    assert started_pods(cluster_of(read(name)), [], []) == Started(fixed, refused=False)


@pytest.mark.parametrize("name", [name for name in FILES if job_of(read(name)) is not None])
def test_each_stage_of_a_file_starts_its_own_group_to_its_maximum(name: str) -> None:
    job: Any = job_of(read(name))
    most = {group["groupName"]: group["maxReplicas"] for group in job["rayClusterSpec"]["workerGroupSpecs"]}
    stages = {"preprocess": "encode", "train": "train"}
    configs = job_configs(job["entrypoint"])
    assert [stages[config.job] for config in configs] == list(most)
    for config in configs:
        demand, group = demand_of(config), stages[config.job]
        found = started_pods(job["rayClusterSpec"], demand.bundles(), demand.selectors())
        assert found == Started({group: most[group]}, refused=False)
