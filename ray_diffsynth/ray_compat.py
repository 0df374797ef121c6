"""What this package uses of Ray beside its public interface.

tests/test_ray_compat.py fails when an upgrade of Ray changes one of them.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated import common_pb2, gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc
from ray.util.placement_group import PlacementGroup, remove_placement_group

DATA_ERRORS_LOGGER = "ray.data._internal.execution.streaming_executor_state"
"""Logger by which Ray Data reports, with the exception, that it ignores a block that failed (`max_errored_blocks`)."""


def init_local(temporary_folder: str | None, options: Mapping[str, Any]) -> None:
    """Start a Ray on this machine, with its sockets and logs below `temporary_folder` (None: where Ray puts them).

    All its processes listen on loopback alone: who reaches one of their ports runs code here.
    """
    with _on_loopback():
        ray.init(address="local", include_dashboard=False, _temp_dir=temporary_folder, **options)


def join(address: str, options: Mapping[str, Any]) -> None:
    """Join the cluster at an address that answers. Raises what Ray raises.

    Ray asks at the machine's address of the network instead of 127.0.0.1, where one that listens on loopback alone does
    not answer: it would try for seven minutes.
    """
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        if services.is_localhost(host) and port.isdigit() and not _answers(services.get_node_ip_address(), int(port)):
            stack.enter_context(_on_loopback())
        ray.init(address=address, **options)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Within it Ray takes 127.0.0.1 for the machine's address, as it does on macOS.

    Given as the node's address it would be replaced by that of the network, and every port be open on all addresses.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


_ANSWER_SECONDS = 10.0


def available_resources() -> dict[str, dict[str, float]]:
    """The resources of each live node that are not in use, by the node's id."""
    found: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return found


def refuses_token(address: str) -> bool:
    """Whether the cluster at `host:port` answers that this process has no token, or not its own."""
    channel = init_grpc_channel(address)
    try:
        service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        service.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=5)
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    except ray.exceptions.AuthenticationError:
        return True
    finally:
        channel.close()
    return False


def cluster_id() -> str:
    """The id of the cluster that this process is in: another one for each that is started."""
    found: str = ray._private.worker.global_worker.node.cluster_id.hex()
    return found


def ended_jobs() -> set[str]:
    """Ids of the jobs of the cluster whose driver has ended or died."""
    return {str(job["JobID"]) for job in ray._private.state.jobs() if job["IsDead"]}


def death_by_memory(worker_id: str) -> str:
    """Says that Ray's memory monitor killed the worker process; "" for one that lives, or died otherwise."""
    accessor = ray._private.state.state._connect_and_get_accessor()
    found = accessor.get_worker_info(ray.WorkerID.from_hex(worker_id))
    if not found:
        return ""
    worker = gcs_pb2.WorkerTableData.FromString(found)
    if worker.is_alive or worker.exit_type != common_pb2.NODE_OUT_OF_MEMORY:
        return ""
    return "Ray's memory monitor killed it, since the machine's memory ran out"


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be taken away (preempted), as Ray Train learns it too."""
    return set(ray._private.state.state.get_draining_nodes() or {})


def taken_away_nodes() -> set[str]:
    """Ids of the nodes that will be taken away, or ended because they were told to: not those that were lost."""
    told = {_ENDED_BY_SIGTERM, _ENDED_AFTER_NOTICE, _ENDED_IDLE}
    return draining_nodes() | {node["NodeID"] for node in ray.nodes() if node.get("DeathReason") in told}


_ENDED_BY_SIGTERM, _ENDED_AFTER_NOTICE, _ENDED_IDLE = 1, 3, 4
"""Reasons of a node's death, as `ray.nodes()` gives them."""


@contextmanager
def no_placement_group_stays() -> Iterator[None]:
    """Placement groups that this job made within the block, and that are there after it, are removed.

    When the process group of Ray Train's workers cannot be made, say because one of them is cut off, Ray Train forgets
    the placement group of its workers. Their machines would be reserved until the job ends.
    """
    before = _placement_groups()
    try:
        yield
    finally:
        for group in _placement_groups() - before:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def _placement_groups() -> set[str]:
    """Ids of this job's placement groups that reserve something; an id ends with that of its job."""
    job = ray.get_runtime_context().get_job_id()
    table: dict[str, dict[str, Any]] = ray.util.placement_group_table()
    return {group for group, entry in table.items() if group.endswith(job) and entry["state"] != "REMOVED"}


@dataclass(frozen=True)
class Autoscaler:
    """What the cluster's autoscaler says. starting, failed: types of nodes that come, or could not be started."""

    starting: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def autoscaler() -> Autoscaler | None:
    """What the autoscaler says; None where the cluster has none: machines come only by hand."""
    found = _second_autoscaler() if is_autoscaler_v2(gcs_client=_gcs_client()) else _first_autoscaler()
    if found is None:
        return None
    types, state = found
    # Every head runs a monitor. Without a configuration it calls the type of each node by the node's id.
    return None if all(_NO_TYPE.fullmatch(name) for name in types) else state


_NO_TYPE = re.compile("node_[0-9a-f]{40,}")


def _gcs_client() -> Any:
    """The connection of this process: the one that `ray.experimental.internal_kv` keeps goes with any other cluster."""
    return ray._private.worker.global_worker.gcs_client


def _first_autoscaler() -> tuple[list[str], Autoscaler] | None:
    status = _gcs_client().internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None)
    report = (json.loads(status) if status else {}).get("autoscaler_report")
    if not report:
        return None
    names = [*(report.get("active_nodes") or {}), *(report.get("idle_nodes") or {})]
    pending = [name for _, name, _ in report.get("pending_nodes") or ()]
    pending += [name for name, count in (report.get("pending_launches") or {}).items() for _ in range(count)]
    failed = [name for _, name in report.get("failed_nodes") or ()]
    return names, Autoscaler(tuple(pending), tuple(failed))


def _second_autoscaler() -> tuple[list[str], Autoscaler]:
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    names = [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
    pending = [node.ray_node_type_name for node in status.pending_nodes]
    pending += [launch.ray_node_type_name for launch in status.pending_launches for _ in range(launch.count)]
    failed = [f"{launch.ray_node_type_name} ({launch.details})" for launch in status.failed_launches]
    return names, Autoscaler(tuple(pending), tuple(failed))


def autoscaling_coordinator() -> Any:
    """Handle of the actor by which Ray Data and Ray Train ask the autoscaler: it adds up who wants what.

    Who calls `ray.autoscaler.sdk.request_resources` itself is overwritten by it, and overwrites what others want.
    """
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator  # takes a second

    return get_or_create_autoscaling_coordinator()
