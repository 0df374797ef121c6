"""The machines of the cluster that this process is connected to, as Ray lists them now."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_diffsynth.cluster.nodes import Cluster
from ray_diffsynth.ray_compat import draining_nodes


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For an actor that must live as long as the driver: on its node, not on one that may be lost."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def joined_cluster() -> Cluster:
    """The cluster that this process is connected to."""
    nodes = _alive()
    return Cluster(
        {name: node["Resources"] for name, node in nodes.items()},
        frozenset(draining_nodes()),
        {name: node.get("Labels") or {} for name, node in nodes.items()},
    )


def alive_nodes() -> dict[str, dict[str, float]]:
    """Resources of the machines of the cluster that are alive, by the node's id."""
    return {name: node["Resources"] for name, node in _alive().items()}


def _alive() -> dict[str, dict[str, Any]]:
    return {str(node["NodeID"]): node for node in ray.nodes() if node["Alive"]}
