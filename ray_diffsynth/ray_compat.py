"""What this package uses of Ray beside its public interface.

tests/test_ray_compat.py fails when an upgrade of Ray changes one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

DATA_ERRORS_LOGGER = "ray.data._internal.execution.streaming_executor_state"
"""Logger by which Ray Data reports, with the exception, that it ignores a block that failed (`max_errored_blocks`)."""


def init_local(temporary_folder: str | None, options: Mapping[str, Any]) -> None:
    """Start a Ray on this machine, with its sockets and logs below `temporary_folder` (None: where Ray puts them)."""
    ray.init(address="local", include_dashboard=False, _temp_dir=temporary_folder, **options)


def available_resources() -> dict[str, dict[str, float]]:
    """The resources of each live node that are not in use, by the node's id."""
    found: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return found


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be taken away (preempted), as Ray Train learns it too."""
    return set(ray._private.state.state.get_draining_nodes() or {})
