"""Whether Ray knows that the holder of a lease is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from ray_diffsynth.cluster import holder
from ray_diffsynth.cluster.holder import has_ended, own_place

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_known_of_a_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(holder, "cluster_id", lambda: "here")
    monkeypatch.setattr(holder, "alive_nodes", lambda: {"a": {}})
    monkeypatch.setattr(holder, "ended_jobs", lambda: {"1"})

    def known(cluster: str, node: str, job: str) -> bool:
        return has_ended({"place": {"cluster": cluster, "node": node, "job": job}})

    assert known("here", "gone", "2") and known("here", "a", "1") and not known("here", "a", "2")
    assert not known("there", "gone", "1"), "nothing is known of the nodes and jobs of another cluster"
    assert not has_ended({}) and not has_ended({"place": "?"})
    monkeypatch.setattr(holder.ray, "is_initialized", lambda: False)
    assert own_place() == {} and not known("here", "gone", "1")


_DRIVER = """
import json, sys, time
import ray
from ray_diffsynth.cluster.holder import own_place
ray.init(address=sys.argv[1], log_to_driver=False)
print(json.dumps(own_place()), flush=True)
time.sleep(600)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_is_known_to_be_gone(local_ray: None) -> None:
    command = [sys.executable, "-c", _DRIVER, ray.get_runtime_context().gcs_address]
    # It takes 127.0.0.1 for this machine's address, as the Ray does that it joins.
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    try:
        assert driver.stdout is not None
        there = json.loads(driver.stdout.readline())
        mine = own_place()
        assert there["cluster"] == mine["cluster"] and there["node"] == mine["node"] and there["job"] != mine["job"]
        assert not has_ended({"place": there}) and not has_ended({"place": mine})
    finally:
        driver.kill()
        driver.wait()
    while not has_ended({"place": there}):  # as long as the test may last
        time.sleep(0.2)
    assert not has_ended({"place": mine})
