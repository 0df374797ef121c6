"""Which pods Ray's autoscaler would start for a demand: Ray's own configuration and scheduler, without a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.check.problem import mapping
from ray_diffsynth.cluster.labels import parsed


@dataclass(frozen=True)
class Started:
    """pods: group -> how many of its pods come to be. refused: the demand goes beyond what the groups may become, of
    which Ray then starts nothing at all."""

    pods: Mapping[str, int]
    refused: bool


def started_pods(
    cluster: Mapping[str, Any],
    bundles: Sequence[Mapping[str, float]],
    selectors: Sequence[Mapping[str, str]],
    *,
    tasks: bool = False,
) -> Started:
    """What the autoscaler v2 starts beside the head of a cluster (the `spec` of a RayCluster) in which nothing runs.

    bundles: resources, all wanted at the same time. selectors: for each the labels that its machine must have. They
    are what `request_resources` asks for, or, with `tasks`, work that waits in the queue.
    """
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint

    resource = {"metadata": {"name": "cluster", "namespace": "default"}, "spec": cluster}
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(resource), skip_content_hash=True)
    requests = ResourceRequestUtil.group_by_count(
        [
            ResourceRequestUtil.make(dict(bundle), label_selectors=[_constraints(selector)] if selector else None)
            for bundle, selector in zip(bundles, selectors, strict=True)
        ]
    )
    wanted = [] if tasks or not requests else [ClusterResourceConstraint(resource_requests=requests)]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            idle_timeout_s=config.get_idle_timeout_s(),
            resource_requests=requests if tasks else [],
            cluster_resource_constraints=wanted,
        )
    )
    head = config.get_head_node_type()
    pods = {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type != head}
    refused = bool(reply.infeasible_cluster_resource_constraints or reply.infeasible_resource_requests)
    return Started(pods, refused)


def _constraints(selector: Mapping[str, str]) -> list[tuple[str, int, list[str]]]:
    """A selector as the autoscaler has it."""
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    found = []
    for label, condition in selector.items():
        values, excluded = parsed(condition)
        name = "LABEL_OPERATOR_NOT_IN" if excluded else "LABEL_OPERATOR_IN"
        found.append((label, LabelSelectorOperator.Value(name), values))
    return found


def spec_of(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `spec` of a RayCluster; of a RayJob that of its own cluster."""
    spec = mapping(document.get("spec"))
    return mapping(spec.get("rayClusterSpec", spec))
