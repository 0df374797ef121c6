"""Exactly once, with real SIGKILLs: after the rerun the cache is byte for byte that of an undisturbed run.

Encoder calls are counted, not timed: only what was encoded and not yet written may be repeated.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from ray_diffsynth.cache.inspection import inspect_cache
from ray_diffsynth.cache.verify import verify_cache
from tests.preprocess.conftest import CAPTIONS, IMAGES, ROOT, SHARD, Job, Stage1, files
from tests.preprocess.counting import behave, build_model, calls
from tests.processes import session_processes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

IN_FLIGHT = 3
"""Shards that may be under way in one actor's pool: one encoded, one handed to the actor, one being written."""


def written(cache: Path) -> int:
    """Images in finished files."""
    return sum(pq.read_metadata(path).num_rows for path in (cache / "vae").glob("*.parquet"))


def check_exactly_once(cache: Path, whole: Path) -> None:
    assert files(cache) == files(whole)
    facts = inspect_cache(str(cache))
    assert (facts["samples"], facts["duplicates"], facts["quarantined"]) == (IMAGES, 0, 0)
    assert not [finding for finding in verify_cache(str(cache)) if finding.kind != "unfinished"]


@pytest.mark.parametrize("part", [1 / 3, 2 / 3], ids=["a third", "two thirds"])
def test_the_driver_is_killed(tmp_path: Path, many: Path, whole: Path, stage1: Stage1, job: Job, part: float) -> None:
    model, cache = build_model(tmp_path / "model", sleep=0.01), tmp_path / "cache"
    running = job(model, many, cache)
    running.wait_for(lambda: written(cache) >= part * IMAGES)
    running.kill()
    assert not (cache / "manifest.json").exists()
    finished, before = written(cache), len(calls(model, "vae"))
    assert part * IMAGES <= finished < IMAGES
    behave(model)
    report = stage1(model, many, cache)
    check_exactly_once(cache, whole)
    assert report["parameters"]["input_latents"] == {"encoded": IMAGES - finished, "reused": finished}
    # What the first run had written was not encoded again, and what it had under way is bounded.
    assert len(calls(model, "vae")) - before == IMAGES - finished
    assert before - finished <= IN_FLIGHT * SHARD
    assert Counter(calls(model, "vae")).most_common(1)[0][1] <= 2


def test_an_actor_is_killed_in_the_middle_of_a_batch(tmp_path: Path, many: Path, whole: Path, stage1: Stage1) -> None:
    model, cache = build_model(tmp_path / "model", kill_after={"vae": 100}), tmp_path / "cache"
    stage1(model, many, cache)
    assert (model / "calls.log.killed").exists()
    check_exactly_once(cache, whole)
    repeated = len(calls(model, "vae")) - IMAGES
    assert 0 < repeated <= SHARD and len(calls(model, "text_encoder")) == CAPTIONS + 1


def test_the_monitor_is_killed(tmp_path: Path, many: Path, whole: Path, job: Job) -> None:
    """It is started again and knows what it knew: nothing is encoded twice, and the count comes to its end."""
    model, cache = build_model(tmp_path / "model", sleep=0.01), tmp_path / "cache"
    running = job(model, many, cache)

    def monitors() -> list[psutil.Process]:
        processes = [psutil.Process(pid) for pid in session_processes(running.process.pid)]
        return [process for process in processes if process.cmdline()[:1] == ["ray::Monitor"]]

    running.wait_for(lambda: written(cache) >= SHARD)
    (monitor,) = monitors()
    monitor.kill()
    running.wait_for(lambda: written(cache) >= 3 * SHARD)
    (again,) = monitors()
    assert again != monitor
    again.kill()
    assert running.process.wait() == 0
    check_exactly_once(cache, whole)
    assert len(calls(model, "vae")) == IMAGES and len(calls(model, "text_encoder")) == CAPTIONS + 1
    assert f"encode vae {IMAGES}/{IMAGES}" in running.log.read_text()


WRITER = """
import os, signal, sys
from ray_diffsynth.cache.store import GroupRow, write_shard
from ray_diffsynth import storage
import torch

moment = sys.argv[2]
real = {name: getattr(os, name) for name in ("fsync", "replace")}
def killed(*arguments):
    if moment == "after rename":
        real["replace"](*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, "fsync" if moment == "before fsync" else "replace", killed)
write_shard(sys.argv[1], "vae", "0" * 24, "64x64", [GroupRow("k", {"x": torch.ones(4)})], codec="planes-zstd")
"""


@pytest.mark.parametrize("moment", ["before fsync", "before rename", "after rename"])
def test_a_write_is_killed(tmp_path: Path, moment: str) -> None:
    """The file is whole or not there, at whatever moment its writer dies."""
    from ray_diffsynth.cache.store import list_shards, read_shard_header

    ended = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), moment], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert list_shards(str(tmp_path), "vae") == (["0" * 24 + ".parquet"] if moment == "after rename" else [])
    for file in list_shards(str(tmp_path), "vae"):
        assert read_shard_header(str(tmp_path), "vae", file, verify=True).keys == ("k",)


# Health checks in a row that a dead machine misses before Ray declares it dead: after 2 s, or 40 s, in which Ray tries
# all that it tries, on the dead machine too.
DECLARED_DEAD = {
    "declared dead soon": {"health_check_period_ms": 1000, "health_check_failure_threshold": 2},
    "declared dead late": {"health_check_period_ms": 5000, "health_check_failure_threshold": 8},
}


@pytest.mark.parametrize("checks", DECLARED_DEAD.values(), ids=DECLARED_DEAD.keys())
def test_a_raylet_is_killed(tmp_path: Path, many: Path, whole: Path, job: Job, checks: dict[str, int]) -> None:
    """One of two nodes goes down in the middle: its shards are encoded on the other as they were, the job goes on."""
    from ray.cluster_utils import Cluster

    model, cache = build_model(tmp_path / "model", sleep=0.01), tmp_path / "cache"
    config = {"health_check_initial_delay_ms": 0, "health_check_timeout_ms": 10_000, **checks}
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": config}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        other = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        running = job(model, many, cache, "--ray_address", cluster.address, "--num_workers", "2")
        running.wait_for(lambda: written(cache) >= SHARD)
        cluster.remove_node(other, allow_graceful=False)
        assert running.process.wait() == 0, running.log.read_text()
    finally:
        cluster.shutdown()
    check_exactly_once(cache, whole)
    assert len(calls(model, "vae")) - IMAGES <= 2 * IN_FLIGHT * SHARD
