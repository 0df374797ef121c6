"""A run whose machines come and go: a two-node cluster on this machine, its second raylet killed and given back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from ray_diffsynth.training.checkpoint import list_checkpoints
from ray_diffsynth.training.report.metrics_log import read_metrics
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config, train_here

ROOT = Path(__file__).resolve().parents[2]


# Each group waits after some steps of its own: that of two until the machine is lost, one of a single worker until it
# is asked to end. A node may take as long as it needs to answer: Ray says which one is lost. One whose resources are
# not listed yet, or still listed as taken, is not waited for for ever: the run begins, or goes on, with one worker.
DRIVER = """
import json, os, sys, time
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.cli import _show_messages
from ray_diffsynth.training.ray import job
from ray_diffsynth.training.ray import elastic
_show_messages(False)  # as the command does
elastic.POLL_SECONDS = 0.5
elastic.ANSWER_SECONDS, elastic.SETTLE_SECONDS = 400.0, 30.0
work = job._worker
lost = sys.argv[2]  # exists when the machine is lost

def slow(arguments):
    class Slow(job.RayRuntime):
        steps = 0

        def stop_requested(self):
            self.steps += 1
            while not (stop := super().stop_requested()) and self.steps > 8 and self.waits():
                time.sleep(0.1)
            return stop

        def waits(self):
            return self.world_size == 1 or not os.path.exists(lost)

    work.__globals__["RayRuntime"] = Slow  # not job's: a function whose name is taken is sent with globals of its own
    work(arguments)

job._worker = slow
print(json.dumps(job.run(TrainConfig(**json.loads(sys.argv[1])))["counts"]))
"""


def wait_for(what: Callable[[], Any]) -> None:
    while not what():  # as long as the test may last
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_shrinks_the_group_and_a_returned_one_grows_it(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    """The same global batch all the time, so the LoRA is that of an undisturbed run."""
    from ray.cluster_utils import Cluster

    options: dict[str, Any] = {"num_epochs": 60, "batch_size": 1, "save_steps": 5, "learning_rate": 1e-3}
    options["log_with"] = "none"
    output = tmp_path / "elastic"
    resources = {"CPU": 1.0}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    steps = 60
    config = make_config(
        tiny_qwen,
        make_cache(),
        output,
        num_workers="1..2",
        resources=resources,
        ray_address=cluster.address,
        max_steps=steps,
        **options,
    )

    def line() -> dict[str, Any]:
        return (read_metrics(str(output)) or [{}])[-1]

    def saved() -> bool:
        return bool(list_checkpoints(str(output)))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "driver.log", "w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(config.to_dict()), str(tmp_path / "lost")],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
        )
        try:
            # The line of a step is written before its checkpoint: without one the run would begin anew.
            wait_for(lambda: (line().get("workers") == 2 and saved()) or driver.poll() is not None)
            cluster.remove_node(second, allow_graceful=False)  # SIGKILL of the raylet and what it started
            (tmp_path / "lost").touch()
            wait_for(lambda: line().get("workers") == 1 or driver.poll() is not None)
            at = line().get("step", 0)
            cluster.add_node(num_cpus=1)
            wait_for(lambda: (line().get("workers") == 2 and line()["step"] > at) or driver.poll() is not None)
            wait_for(lambda: driver.poll() is not None)
        finally:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
            cluster.shutdown()
    logged = (tmp_path / "driver.log").read_text()
    assert driver.returncode == 0, logged
    lines = read_metrics(str(output))
    assert [entry["step"] for entry in lines] == list(range(1, steps + 1))
    sizes = [entry["workers"] for entry in lines]
    changes = [size for n, size in enumerate(sizes) if n == 0 or sizes[n - 1] != size]
    assert changes in ([2, 1, 2], [1, 2, 1, 2]), logged
    assert "a worker was lost" in logged and "there is room for more workers" in logged
    assert "of the trained parameters get no gradient" in logged and logged.count("going on from step") >= 3, logged
    assert {entry["samples"] for entry in lines} == {2}

    alone = make_config(
        tiny_qwen, make_cache(), tmp_path / "alone", gradient_accumulation_steps=2, max_steps=steps, **options
    )
    train_here(alone)
    first, other = (
        safetensors.torch.load_file(folder / f"step-{steps}.safetensors") for folder in (output, tmp_path / "alone")
    )
    assert max(float((first[name] - other[name]).abs().max()) for name in first) <= 1e-5
