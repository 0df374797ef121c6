"""Ctrl-C at a terminal: SIGINT to the job and everything that it started; and the exit codes of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from ray_diffsynth.demo.draw import draw_dataset
from ray_diffsynth.training.checkpoint import list_checkpoints
from tests.processes import kill_session

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def job(name: str, arguments: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job in a process group and session of its own, as a shell starts it; its output goes to `log`."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            # What runs in the background of a script, these tests too perhaps, has SIGINT ignored and hands that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield process
    finally:
        kill_session(process)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    while not condition():  # as long as the test may last
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)


def check_clean(log: Path, output: Path) -> None:
    said = log.read_text()
    assert f"interrupted: what is finished lies in {output}; the same command goes on from there" in said
    assert "Traceback" not in said and "core_worker" not in said
    assert all(len(line) <= 80 for line in said.splitlines() if line.startswith(("scan", "encode", "train "))), said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c(tiny_qwen: Path, fp32_cache: Path, tmp_path: Path) -> None:
    """Each job amid its work: 130, what was finished is kept, no traceback."""
    draw_dataset(tmp_path / "data", 40)
    cache, lora = tmp_path / "cache", tmp_path / "lora"
    first: list[str | Path] = ["--model", tiny_qwen, "--dataset_base_path", tmp_path / "data", "--output_path", cache]
    second: list[str | Path] = ["--model", tiny_qwen, "--dataset_base_path", fp32_cache, "--output_path", lora]
    second += ["--dtype", "float32", "--num_epochs", "100000", "--save_steps", "2", "--lora_target_modules", "to_q"]
    logs = tmp_path / "preprocess.log", tmp_path / "train.log"
    # One after the other: a Ray that does not come up in 30 s, as two may not on a busy machine, gives up by itself.
    with job("preprocess", first, logs[0]) as encoding:
        wait_for(lambda: bool(list(cache.glob("*/*.parquet"))), encoding, logs[0])
        os.killpg(encoding.pid, signal.SIGINT)
        assert encoding.wait() == 130, logs[0].read_text()
    with job("train", second, logs[1]) as training:
        wait_for(lambda: bool(list(lora.glob("checkpoints/step-*/state.json"))), training, logs[1])
        os.killpg(training.pid, signal.SIGINT)
        assert training.wait() == 130, logs[1].read_text()
    check_clean(logs[0], cache)
    check_clean(logs[1], lora)
    assert not (cache / "manifest.json").exists() and list_checkpoints(str(lora))


def run(name: str, *arguments: str | Path) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_exit_codes_of_processes(tiny_qwen: Path, tmp_path: Path) -> None:
    """0 and 2 need no torch; 1 comes before Ray starts."""
    assert run("train", "--help")[0] == 0
    code, said = run("train", "--dataset_base_path", "x", "--model", "y", "--learning_rat", "1")
    assert code == 2 and said.startswith("train.py: --learning_rat is not an option; did you mean learning_rate?")
    code, said = run("train", "--dataset_base_path", tmp_path, "--model", tiny_qwen, "--output_path", tmp_path / "out")
    assert code == 1 and said.startswith(f"error: {tmp_path} holds no committed cache") and "Traceback" not in said
