"""Both stages on a cluster that Ray's own autoscaler starts from no node and brings back to none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.dataset import draw_sizes
from tests.cluster.fake_nodes import ROOT, Scaling, scaling_cluster
from tests.cluster.paced import QWEN, calls, hold, release
from tests.processes import kill_session

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SIZES = ((32, 32), (32, 48), (48, 32), (32, 64), (64, 32), (48, 48))
IMAGES = 2
"""Of each size, so many are a shard."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Scaling]:
    """As many nodes that encode as stage 1 may want, and more that train than stage 2 wants."""
    resources, most = {"encode": {"CPU": 2, "GPU": 1}, "train": {"CPU": 1}}, {"encode": 2, "train": 4}
    kinds = {
        name: {"resources": resources[name], "labels": {"stage": name}, "max_workers": most[name]} for name in resources
    }
    with scaling_cluster(tmp_path, kinds) as found:
        yield found


def test_each_stage_has_its_own_nodes_from_none_to_none(cluster: Scaling, tiny_qwen: Path, tmp_path: Path) -> None:
    """Stage 1 grows to its two actors on two nodes; stage 2 has its two workers on two others, started at once."""
    model = Path(shutil.copytree(tiny_qwen, tmp_path / "model"))
    cache, lora, log = tmp_path / "cache", tmp_path / "lora", tmp_path / "job.log"
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "--model", str(model), "--family", QWEN]
    command += ["--dataset_base_path", str(draw_sizes(tmp_path / "data", SIZES, IMAGES)), "--cache_path", str(cache)]
    command += ["--output_path", str(lora), "--max_steps", "2", "--lora_target_modules", "to_q", "--log_with", "none"]
    command += ["--preprocess.num_workers", "1..2", "--train.num_workers", "2"]
    command += ["--train.resources", json.dumps({"CPU": 1, "GPU": 0})]
    for stage, label in (("preprocess", "encode"), ("train", "train")):
        command += [f"--{stage}.node_labels", json.dumps({"stage": label})]
    hold(model, "vae", IMAGES + 1)  # Ray Data asks for more when it has seen how long a shard takes
    began = time.monotonic()
    with log.open("wb") as output:
        job = subprocess.Popen(
            command, env=cluster.environment, stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )
    try:
        while len({call.node for call in calls(model, "vae")}) < 2:  # as long as the test may last
            assert job.poll() is None, log.read_text()
            time.sleep(0.1)
        both = time.monotonic() - began
        release(model, "vae")
        assert job.wait() == 0, log.read_text()
        ended = time.monotonic() - began
        while len(cluster.events("end")) < len(cluster.events("start")):
            time.sleep(0.1)
        gone = time.monotonic() - began
        assert cluster.wanted() == [], "the jobs have ended, and something is still asked for"
    finally:
        kill_session(job)
        print(log.read_text(), cluster.log.read_text(), cluster.events("start"), cluster.events("end"), sep="\n")
    print(f"two encode nodes after {both:.0f} s, done after {ended:.0f} s, none left after {gone:.0f} s")
    started = cluster.events("start")
    assert Counter(event["kind"] for event in started) == {"encode": 2, "train": 2}
    committed = (cache / "manifest.json").stat().st_mtime
    assert {event["kind"] for event in started if event["time"] < committed} == {"encode"}
    assert {event["kind"] for event in started if event["time"] > committed} == {"train"}
    nodes = {kind: {event["node"] for event in started if event["kind"] == kind} for kind in ("encode", "train")}
    for part, kind in (("vae", "encode"), ("train", "train")):
        assert {call.node for call in calls(model, part)} == nodes[kind], part
    assert {call.node for call in calls(model, "text_encoder")} <= nodes["encode"]
    for part in ("vae", "text_encoder"):
        times = Counter(call.digest for call in calls(model, part))
        assert len(times) >= IMAGES * len(SIZES) and set(times.values()) == {1}, f"{part}: {times}"
    assert json.loads((lora / "report.json").read_text())["counts"]["steps"] == 2
