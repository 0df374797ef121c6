"""Ray's autoscaler on this machine: a head without CPUs, and nodes that it starts and ends by itself as it sees fit."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.sdk import get_cluster_status

from tests.cluster.patience import be_patient
from tests.processes import free_ports, kill_session

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 100 * 2**20
"""Bytes of each node's object store."""


class RecordingProvider(FakeMultiNodeProvider):
    """In place of a cloud: starts raylets on this machine, and writes a line for each that it starts and ends."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        be_patient()

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: Any, labels: Any
    ) -> None:
        before = set(self._nodes)
        os.environ["RAY_NODE_TYPE_NAME"] = tags[TAG_RAY_USER_NODE_TYPE]  # else the label of its group is the head's
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
        for node in set(self._nodes) - before:
            self._write("start", node, tags[TAG_RAY_USER_NODE_TYPE])

    def terminate_node(self, node_id: str) -> None:
        kind = self.node_tags(node_id)[TAG_RAY_USER_NODE_TYPE]
        super().terminate_node(node_id)
        self._write("end", node_id, kind)

    def _write(self, what: str, node: str, kind: str) -> None:
        with open(self.provider_config["record"], "a") as file:
            file.write(json.dumps({"what": what, "node": node, "kind": kind, "time": time.time()}) + "\n")


@dataclass(frozen=True)
class Scaling:
    """A cluster whose nodes come and go. environment: of whoever joins it."""

    address: str
    environment: dict[str, str]
    record: Path
    log: Path

    def events(self, what: str) -> list[dict[str, Any]]:
        """The nodes that were started (`start`) or ended (`end`) so far: node, kind, and when, as time.time()."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [event for event in map(json.loads, lines) if event["what"] == what]

    def wanted(self) -> list[Any]:
        """What somebody asks the autoscaler for, whether it is there or not."""
        demands = get_cluster_status(self.address).resource_demands.cluster_constraint_demand
        return [bundle for demand in demands for bundle in demand.bundles_by_count]


@contextmanager
def scaling_cluster(folder: Path, kinds: dict[str, dict[str, Any]]) -> Iterator[Scaling]:
    """A head that scales from zero. kinds: types of nodes as in a cluster's YAML: resources, labels, max_workers.

    Everything listens on loopback alone, and is gone at the end.
    """
    gcs, agent, client, metrics = free_ports(4)
    record, log, config = folder / "nodes.jsonl", folder / "head.log", folder / "autoscaler.json"
    temporary = Path("/tmp") / f"rds-{secrets.token_hex(4)}"  # short: it holds sockets
    head = {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    provider = {
        "type": "external",
        "module": f"{__name__}.{RecordingProvider.__name__}",
        "gcs_address": f"127.0.0.1:{gcs}",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "record": str(record),
    }
    workers = {
        name: {
            "node_config": {},
            "min_workers": 0,
            **kind,
            "resources": {"object_store_memory": MEMORY, **kind["resources"]},
        }
        for name, kind in kinds.items()
    }
    config.write_text(
        json.dumps(
            {
                "cluster_name": "tested",
                "max_workers": sum(kind["max_workers"] for kind in kinds.values()),
                "provider": provider,
                "available_node_types": {**head, **workers},
                "head_node_type": "ray.head.default",
                # Ray's launcher would have filled these in.
                **dict.fromkeys(("auth", "file_mounts"), {}),
                **{f"{who}setup_commands": [] for who in ("", "head_", "worker_")},
                **dict.fromkeys(("initialization_commands", "cluster_synced_files"), []),
                # Long enough for what asks late on a machine that others load too: Ray Train's controller asks for its
                # workers when it is up, and a node that ended before is started again.
                "idle_timeout_minutes": 0.5,
            }
        )
    )
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment = {
        **known,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # 127.0.0.1 is the address of all nodes
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
    }
    fake = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    command = [sys.executable, "-m", "tests.cluster.patience", "start", "--head", "--block", "--num-cpus=0"]
    command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={temporary}", "--include-dashboard=false"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += [f"--metrics-export-port={metrics}", f"--object-store-memory={MEMORY}", "--disable-usage-stats"]
    command += [f"--autoscaling-config={config}"]
    started = {name: value for name, value in {**environment, **fake}.items() if name != "RAY_ADDRESS"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=started, stdout=output, stderr=output, cwd=ROOT, start_new_session=True)
    try:
        while "Ray runtime started" not in log.read_text():  # as long as the test may last
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield Scaling(f"127.0.0.1:{gcs}", environment, record, log)
    finally:
        kill_session(process)
        shutil.rmtree(temporary, ignore_errors=True)
