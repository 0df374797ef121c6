"""Two processes that torchrun starts: one lease, a second run refused, SIGTERM answered by a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ray_diffsynth.cache.lease import LEASE
from ray_diffsynth.training.checkpoint import list_checkpoints
from ray_diffsynth.training.report.metrics_log import read_metrics
from tests.processes import kill_session
from tests.training.conftest import CacheMaker

ROOT = Path(__file__).resolve().parents[2]


def start(log: Path, *options: str | Path) -> subprocess.Popen[bytes]:
    """`jobs/train.py` in two processes, whose output goes to `log`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*torchrun, str(ROOT / "jobs" / "train.py"), *map(str, options)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_run_of_two_processes_has_the_output_path(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    options = ["--model", tiny_qwen, "--dataset_base_path", make_cache(), "--output_path", output]
    options += ["--dtype", "float32", "--num_epochs", "100000", "--save_steps", "100000", "--log_with", "none"]
    options += ["--lora_target_modules", "to_q"]
    first = start(tmp_path / "first.log", *options)
    second = None
    try:
        while len(read_metrics(str(output))) < 2:
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.2)
        holder = json.loads((output / LEASE).read_text())["pid"]
        assert psutil.Process(holder).environ()["RANK"] == "0"
        second = start(tmp_path / "second.log", *options)
        assert second.wait() == 1
        told = (tmp_path / "second.log").read_text()
        assert f"{output} is being written by process {holder} on" in told
        assert json.loads((output / LEASE).read_text())["pid"] == holder and first.poll() is None
        os.kill(first.pid, signal.SIGTERM)
        assert first.wait() != 0
    finally:
        for process in filter(None, (first, second)):
            kill_session(process)
    said = (tmp_path / "first.log").read_text()
    (name,) = list_checkpoints(str(output))
    steps = json.loads((output / "report.json").read_text())["counts"]["steps"]
    assert int(name.removeprefix("step-")) == steps and len(read_metrics(str(output))) == steps >= 2, said
    assert not (output / LEASE).exists(), said
