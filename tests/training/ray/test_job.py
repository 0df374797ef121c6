"""Training on a local Ray: the same LoRA on one worker and on two, recovery, and errors that come through."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import safetensors.torch
import torch

from ray_diffsynth.cluster.session import ClusterError
from ray_diffsynth.training.checkpoint import list_checkpoints
from ray_diffsynth.training.data.source import SourceError
from ray_diffsynth.training.ray import job
from ray_diffsynth.training.report.metrics_log import read_metrics
from tests.processes import LOOPBACK, listening
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config, train_here

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def lora(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def difference(a: Path, b: Path) -> float:
    first, second = lora(a), lora(b)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_killed_worker_costs_nothing(
    tiny_qwen: Path,
    make_cache: CacheMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SIGKILL of the worker's process within a step; the job goes on from the checkpoint and ends in the same bytes."""
    options: dict[str, Any] = {"max_steps": 5, "save_steps": 2, "num_workers": 1, "resources": {"CPU": 1}}
    train_here(make_config(tiny_qwen, make_cache(), tmp_path / "whole", **options))
    once = tmp_path / "once"

    def dies(arguments: dict[str, Any]) -> None:
        class Dying(job.RayRuntime):
            def report(self, metrics: Any) -> None:
                super().report(metrics)
                if metrics["step"] == 3 and not once.exists():
                    while not list_checkpoints(str(tmp_path / "killed")):  # it is written beside the steps
                        time.sleep(0.01)
                    once.touch()
                    os.kill(os.getpid(), 9)

        job.RayRuntime = Dying  # type: ignore[misc]
        job._worker(arguments)

    monkeypatch.setattr(job, "_worker", dies)
    with caplog.at_level(logging.INFO):
        job.run(make_config(tiny_qwen, make_cache(), tmp_path / "killed", **options))
    # What the worker says reaches the driver, before the loss and after it.
    assert "2 of the trained parameters get no gradient" in caplog.text
    assert caplog.text.index("a worker was lost") < caplog.text.index("going on from step 2 of 5")
    assert once.exists()
    assert (tmp_path / "whole/step-5.safetensors").read_bytes() == (tmp_path / "killed/step-5.safetensors").read_bytes()
    assert [line["step"] for line in read_metrics(str(tmp_path / "killed"))] == [1, 2, 3, 4, 5]


def test_sigterm_saves_and_the_same_command_goes_on(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_epochs": 2000, "num_workers": 1, "resources": {"CPU": 1}, "save_steps": 10_000}
    options["log_with"] = "none"

    def terminate() -> None:
        while len(read_metrics(str(tmp_path / "run"))) < 3:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(SystemExit) as left:
        job.run(make_config(tiny_qwen, make_cache(), tmp_path / "run", **options))
    thread.join()
    assert left.value.code == 143
    (name,) = list_checkpoints(str(tmp_path / "run"))
    step = int(name.removeprefix("step-"))
    assert json.loads((tmp_path / "run/report.json").read_text())["counts"]["steps"] == step >= 3
    for folder in ("run", "whole"):
        config = make_config(tiny_qwen, make_cache(), tmp_path / folder, **{**options, "max_steps": step + 2})
        train_here(config)
    files = [(tmp_path / folder / f"step-{step + 2}.safetensors") for folder in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_sample_images_are_made_beside_the_training(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    options: dict[str, Any] = {"max_steps": 4, "num_workers": 1, "resources": {"CPU": 1}, "sample_steps": 2}
    options |= {"height": 64, "width": 64, "sample_inference_steps": 2}
    options["validation_prompts"] = str(tmp_path / "prompts.txt")
    job.run(make_config(tiny_qwen, make_cache(), tmp_path / "out", **options))
    assert "ended early" not in caplog.text
    grids = sorted((tmp_path / "out/samples").iterdir())
    assert [path.name for path in grids] == ["step-00000000.png", "step-00000002.png", "step-00000004.png"]
    assert Image.open(grids[0]).size == (128, 64)
    assert len({Image.open(path).tobytes() for path in grids}) == 3  # the LoRA moved, the noise did not
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [grid["title"] for grid in report["samples"]] == ["Base model", "Step 2", "Step 4"]
    events = EventAccumulator(str(tmp_path / "out/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [0, 2, 4]


def test_errors_come_through(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="for trained models 'dit'"):  # before any worker starts
        job.run(make_config(tiny_qwen, make_cache(), tmp_path, trainable_models="text_encoder"))
    with pytest.raises(ClusterError, match="99 workers of .* do not fit"):
        job.run(make_config(tiny_qwen, make_cache(), tmp_path, num_workers=99))
    with pytest.raises(Exception, match=r"to_qq.*did you mean"):  # from a worker, without three attempts
        job.run(make_config(tiny_qwen, make_cache(), tmp_path, lora_target_modules="to_qq"))
    assert list_checkpoints(str(tmp_path)) == []
    assert ray.is_initialized()


def test_two_workers_train_the_lora_of_one_and_it_is_elastic(
    tiny_qwen: Path,
    make_cache: CacheMaker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same two virtual_ranks: served by one process, by two workers, and by 1, then 2, then 1 of them."""
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-3, "batch_size": 2}
    alone = make_config(tiny_qwen, make_cache(), tmp_path / "one", gradient_accumulation_steps=2, **options)
    train_here(alone)

    def noted(arguments: dict[str, Any]) -> None:
        (tmp_path / f"listening-{os.getpid()}").write_text(" ".join(listening(psutil.Process())))
        job._worker(arguments)

    with monkeypatch.context() as patched:
        patched.setattr(job, "_worker", noted)
        report = job.run(make_config(tiny_qwen, make_cache(), tmp_path / "two", num_workers=2, **options))
    # Each listens for Ray and for the other one (Gloo); the first has torch's store.
    addresses = [path.read_text().split() for path in tmp_path.glob("listening-*")]
    assert sorted(map(len, addresses)) == [2, 3] and {*addresses[0], *addresses[1]} <= LOOPBACK, addresses
    assert report["counts"]["workers"] == 2
    assert "trained 6 of 6 steps on 10 samples" in capsys.readouterr().out
    assert json.loads((tmp_path / "two/report.json").read_text())["counts"]["steps"] == 6
    assert difference(tmp_path / "one/step-6.safetensors", tmp_path / "two/step-6.safetensors") <= 1e-5
    assert len(read_metrics(str(tmp_path / "two"))) == 6

    for steps, workers in ((2, 1), (4, 2), (6, 1)):
        changes: dict[str, Any] = {**options, "max_steps": steps, "gradient_accumulation_steps": 2}
        config = make_config(tiny_qwen, make_cache(), tmp_path / "elastic", num_workers=workers, **changes)
        if workers == 1:
            train_here(config)
        else:
            job.run(config)
    assert difference(tmp_path / "one/step-6.safetensors", tmp_path / "elastic/step-6.safetensors") <= 1e-5
