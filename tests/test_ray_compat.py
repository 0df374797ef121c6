"""What this package uses of Ray beside its public interface is still there: read this first after an upgrade of Ray."""

from __future__ import annotations

import importlib
import inspect
import json
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray._private import services
from ray.autoscaler._private.autoscaler import AutoscalerSummary
from ray.autoscaler._private.util import format_readonly_node_type
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo
from ray.core.generated.common_pb2 import NodeDeathInfo, WorkerExitType
from ray.core.generated.gcs_pb2 import WorkerTableData
from ray.data import DataContext
from ray.experimental.internal_kv import _initialize_internal_kv, _internal_kv_reset

from ray_diffsynth import ray_compat
from ray_diffsynth.errors import UserError, find_user_error, remote_cause, worker_failures


def test_ray_data_logs_the_blocks_that_it_ignores_with_their_exception() -> None:
    source = inspect.getsource(importlib.import_module(ray_compat.DATA_ERRORS_LOGGER))
    assert "logger = logging.getLogger(__name__)" in source, "Ray Data's executor logs elsewhere: see Reports"
    _, _, ignored = source.partition("Ignoring this exception with remaining")
    assert "logger.error(error_message, exc_info=e)" in ignored[:300], "an ignored block is told without its exception"


def test_the_settings_of_ray_data_that_a_pass_sets_are_there() -> None:
    names = ("enable_fallback_to_arrow_object_ext_type", "max_errored_blocks", "execution_no_progress_timeout_s")
    missing = {*names, "custom_execution_callback_classes"} - set(vars(DataContext.get_current()))
    assert not missing, f"Ray Data's context has no {missing} any more: setting them would do nothing"


def test_ray_train_registers_its_handler_of_ctrl_c_by_a_method() -> None:
    trainer = ray.train.torch.TorchTrainer
    assert list(inspect.signature(trainer._register_sigint_handler).parameters) == ["self", "controller"]
    module = inspect.getsource(inspect.getmodule(trainer._register_sigint_handler) or ray)
    assert "self._register_sigint_handler(controller)" in module, "Ctrl-C would be Ray Train's again"


def test_errors_of_other_processes_hold_what_was_raised() -> None:
    told = UserError("no such cache")
    task = ray.exceptions.RayTaskError("f", "traceback", told)
    assert remote_cause(task) is told, "RayTaskError.cause is no more"
    group = ray.train.WorkerGroupError("failed", {1: task})
    assert worker_failures(group) == {1: task}, "WorkerGroupError.worker_failures is no more"
    assert find_user_error(group) is told and remote_cause(told) is None and worker_failures(told) == {}


@pytest.mark.parametrize(("listens_at", "everywhere"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_cluster_on_loopback_alone_is_asked_there(
    monkeypatch: pytest.MonkeyPatch, listens_at: str, everywhere: bool
) -> None:
    """Where it listens on all addresses it is asked at that of the network, by which its other machines know it."""
    asked: list[str] = []

    def init(address: str, **options: object) -> None:
        assert options == {"log_to_driver": False}
        asked.append(services.resolve_ip_for_localhost(address.rpartition(":")[0] or address))

    monkeypatch.setattr(ray._private.worker, "_global_node", None)  # of the session's Ray, which is on loopback
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda _: "127.0.0.2")
    monkeypatch.setattr(ray, "init", init)
    with socket.create_server((listens_at, 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "192.0.2.1"):
            ray_compat.join(f"{host}:{port}", {"log_to_driver": False})
        ray_compat.join("auto", {"log_to_driver": False})
    network = "127.0.0.2" if everywhere else "127.0.0.1"
    assert asked[:3] == [network, network, "192.0.2.1"] and len(asked) == 4
    assert services.get_node_ip_address() == "127.0.0.2", "the setting is taken back"


@pytest.mark.parametrize(
    ("exit_type", "alive", "expected"),
    [
        ("NODE_OUT_OF_MEMORY", False, "Ray's memory monitor killed it, since the machine's memory ran out"),
        ("NODE_OUT_OF_MEMORY", True, ""),
        ("SYSTEM_ERROR", False, ""),
    ],
)
def test_a_process_that_died_for_memory_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, exit_type: str, alive: bool, expected: str
) -> None:
    row = WorkerTableData(is_alive=alive, exit_type=WorkerExitType.Value(exit_type)).SerializeToString()
    accessor = SimpleNamespace(get_worker_info=lambda worker: row if worker.hex() == "ab" * 28 else None)
    monkeypatch.setattr(ray._private.state.state, "_connect_and_get_accessor", lambda: accessor)
    assert ray_compat.death_by_memory("ab" * 28) == expected
    assert ray_compat.death_by_memory("cd" * 28) == ""


@pytest.mark.ray
def test_a_process_that_died_otherwise(local_ray: None) -> None:
    """Ray knows it by the id under which it reports attempts."""

    @ray.remote
    class Here:
        def worker(self) -> str:
            return str(ray.get_runtime_context().get_worker_id())

    actor = Here.remote()
    worker = ray.get(actor.worker.remote())
    accessor = ray._private.state.state._connect_and_get_accessor()
    assert WorkerTableData.FromString(accessor.get_worker_info(ray.WorkerID.from_hex(worker))).is_alive
    assert ray_compat.death_by_memory(worker) == ""
    ray.kill(actor)
    while WorkerTableData.FromString(accessor.get_worker_info(ray.WorkerID.from_hex(worker))).is_alive:
        time.sleep(0.1)
    assert ray_compat.death_by_memory(worker) == ""


@pytest.mark.ray
def test_the_state_of_the_nodes(local_ray: None) -> None:
    nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    available = ray_compat.available_resources()
    assert available.keys() == nodes and all("CPU" in resources for resources in available.values())
    assert ray_compat.draining_nodes() == ray_compat.taken_away_nodes() == set()
    assert all("DeathReason" in node for node in ray.nodes())
    _internal_kv_reset()  # as the end of another cluster in this process does
    assert ray_compat.autoscaler() is None
    _initialize_internal_kv(ray._private.worker.global_worker.gcs_client)


def test_why_a_node_ended() -> None:
    reasons = (ray_compat._ENDED_BY_SIGTERM, ray_compat._ENDED_AFTER_NOTICE, ray_compat._ENDED_IDLE)
    named = (NodeDeathInfo.EXPECTED_TERMINATION, NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
    assert reasons == (*named, NodeDeathInfo.AUTOSCALER_DRAIN_IDLE)


REPORT = """{"autoscaler_report": {"active_nodes": {"head": 1}, "idle_nodes": null,
 "failed_nodes": [["10.0.0.2", "encode"]], "pending_nodes": [["10.0.0.1", "encode", "setting-up"]],
 "pending_launches": {"train": 2}}}"""


def test_the_first_autoscaler_says_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields of its report, which `ray status` prints; and the types by which a head without one calls its nodes."""
    fields = inspect.getsource(AutoscalerSummary)
    for name in ("active_nodes: Dict[NodeType, int]", "pending_nodes: List[", "pending_launches: Dict[NodeType, int]"):
        assert name in fields
    assert "failed_nodes: List[Tuple[NodeIP, NodeType]]" in fields
    by_hand = json.dumps({"autoscaler_report": {"active_nodes": {format_readonly_node_type("6e" * 28): 1}}})
    monkeypatch.setattr(ray_compat, "is_autoscaler_v2", lambda **_: False)
    for status, expected in (
        (REPORT, ray_compat.Autoscaler(("encode", "train", "train"), ("encode",))),
        (by_hand, None),
        ("", None),
        ("{}", None),
    ):
        client = SimpleNamespace(internal_kv_get=lambda key, namespace, status=status: status.encode())
        monkeypatch.setattr(ray_compat, "_gcs_client", lambda client=client: client)
        assert ray_compat.autoscaler() == expected


def test_the_second_autoscaler_says_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LaunchRequest("train", "train", 2, LaunchRequest.Status.PENDING, 0)
    failed = LaunchRequest("encode", "encode", 1, LaunchRequest.Status.FAILED, 0, details="no quota")
    head = NodeInfo("m5", "head", "id", "10.0.0.1")
    status = ClusterStatus(active_nodes=[head], pending_launches=[launch], failed_launches=[failed])
    monkeypatch.setattr(ray_compat, "is_autoscaler_v2", lambda **_: True)
    monkeypatch.setattr(ray_compat, "get_cluster_status", lambda address: status)
    monkeypatch.setattr(ray_compat, "_gcs_client", lambda: None)
    monkeypatch.setattr(ray_compat.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="a:1"))
    assert ray_compat.autoscaler() == ray_compat.Autoscaler(("train", "train"), ("encode (no quota)",))


@pytest.mark.ray
def test_a_placement_group_of_the_block_does_not_outlive_it(local_ray: None) -> None:
    """By the ids of this job's groups, which end with the job's: those of others, and those from before, stay."""
    before = ray.util.placement_group([{"CPU": 0.1}])
    ray.get(before.ready())
    with ray_compat.no_placement_group_stays():
        left = ray.util.placement_group([{"CPU": 0.1}])
        ray.get(left.ready())
    states = {group: entry["state"] for group, entry in ray.util.placement_group_table().items()}
    assert (states[before.id.hex()], states[left.id.hex()]) == ("CREATED", "REMOVED")
    ray.util.remove_placement_group(before)


def test_a_dataset_keeps_what_it_wanted_as_long_as_the_session_says() -> None:
    """Ray Data reads the variable not when it is imported, but when a dataset first runs: in a session."""
    program = """
import os, sys
import ray.data
package = "ray.data._internal.cluster_autoscaler"
assert package not in sys.modules
os.environ["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"] = "7"
from ray.data._internal.cluster_autoscaler import RateBasedClusterAutoscaler, create_cluster_autoscaler
assert RateBasedClusterAutoscaler.AUTOSCALING_REQUEST_EXPIRE_TIME_S == 7
"""
    subprocess.run([sys.executable, "-c", program], check=True)
