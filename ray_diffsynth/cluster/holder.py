"""Where the holder of a lease runs, and whether Ray knows that it is gone: then a retry elsewhere need not wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from ray_diffsynth.cluster.joined import alive_nodes
from ray_diffsynth.ray_compat import cluster_id, ended_jobs


def own_place() -> dict[str, str]:
    """Ids of this process's cluster, node and job; empty where Ray is not up."""
    if not ray.is_initialized():
        return {}
    context = ray.get_runtime_context()
    return {"cluster": cluster_id(), "node": context.get_node_id(), "job": context.get_job_id()}


def has_ended(lease: Mapping[str, Any]) -> bool:
    """Whether Ray knows that the holder is gone: its node or its job, if it is of the cluster that this process is in.

    Of a holder in another cluster, or in none, nothing is known.
    """
    place = lease.get("place")
    if not ray.is_initialized() or not isinstance(place, dict) or place.get("cluster") != cluster_id():
        return False
    return place.get("node") not in alive_nodes() or place.get("job") in ended_jobs()
