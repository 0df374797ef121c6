"""Saves are written beside the steps: exactly what was trained then, one at a time, and a failure is told."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.cache.lease import LEASE, Lease, lease
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.storage import folders
from ray_diffsynth.training import checkpointing
from ray_diffsynth.training.background import BackgroundWriter
from ray_diffsynth.training.checkpoint import list_checkpoints
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.result import TrainResult
from ray_diffsynth.training.runtime import LocalRuntime
from ray_diffsynth.training.start import Start
from ray_diffsynth.training.trainer import train
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config

SECONDS = 60.0
"""After which a test fails that waits for what never comes."""


class Steps(LocalRuntime):
    """Calls `act` with each step that was trained."""

    def __init__(self, act: Callable[[int], None] = lambda step: None) -> None:
        super().__init__("cpu", progress=False)
        self.act = act
        self.seen: list[int] = []

    def report(self, metrics: Mapping[str, Any]) -> None:
        self.seen.append(metrics["step"])
        self.act(metrics["step"])


def run(model: Path, base: Path, output: Path, runtime: LocalRuntime | None = None, **changes: Any) -> TrainResult:
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "keep_checkpoints": 9, "log_with": "none"}
    config = make_config(model, base, output, **{**options, **changes})
    return train(RunPlan.resolve(config), runtime or Steps())


def test_one_write_at_a_time_and_its_error_comes_out() -> None:
    writer, go, done = BackgroundWriter(), threading.Event(), list[str]()

    def first() -> None:
        assert go.wait(SECONDS)
        done.append("first")

    def second() -> None:
        done.append("second")
        raise OSError(errno.ENOSPC, "No space left on device", "file")

    writer.start(first)
    writer.raise_failed()  # nothing has, yet
    assert done == []
    threading.Timer(0.1, go.set).start()
    writer.start(second)  # waits
    assert done[0] == "first"
    with pytest.raises(OSError, match="No space left on device: 'file'"):
        writer.wait()
    writer.wait()
    writer.raise_failed()
    writer.start(lambda: done.append("third"))
    writer.wait()
    assert done == ["first", "second", "third"]


def test_steps_go_on_while_a_save_is_written(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save after step 2 ends only when step 4 is done; the one after step 4 waits for it."""
    reached, save = threading.Event(), checkpointing.save_checkpoint
    seen_by_writer: dict[int, tuple[int, list[str]]] = {}
    writing = 0

    def slow(output_path: str, checkpoint: Any, keep: int) -> str:
        nonlocal writing
        writing += 1
        assert writing == 1
        if checkpoint.step == 2:
            assert reached.wait(SECONDS), "the step waits for the save"
        seen_by_writer[checkpoint.step] = runtime.seen[-1], list_checkpoints(output_path)
        folder = save(output_path, checkpoint, keep)
        writing -= 1
        return folder

    monkeypatch.setattr(checkpointing, "save_checkpoint", slow)
    runtime = Steps(lambda step: reached.set() if step == 4 else None)
    result = run(tiny_qwen, make_cache(), tmp_path, runtime, keep_checkpoints=1)
    assert seen_by_writer[2] == (4, [])
    assert seen_by_writer[4][1] == ["step-00000002"]  # what is older goes when the new one is whole
    assert runtime.seen == [1, 2, 3, 4, 5, 6]
    assert list_checkpoints(str(tmp_path)) == ["step-00000006"]
    assert result.checkpoint == str(tmp_path / "checkpoints/step-00000006")
    assert result.files == [str(tmp_path / f"step-{step}.safetensors") for step in (2, 4, 6)]


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.9, "lr_scheduler": "cosine", "lora_dropout": 0.1},
        {"customized_optimizer": "tests.training.own_optimizers:ScheduleFreeSGD", "learning_rate": 1.0},
        {"trainable_models": "dit", "learning_rate": 1e-4, "save_steps": 3},
        {"save_steps": None, "num_epochs": 2, "batch_size": 4, "max_steps": None},
    ],
    ids=["ema", "schedule-free", "whole model", "epochs"],
)
def test_what_is_written_later_is_what_was_trained_then(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Every file of a run that writes each save only when further steps are done has the bytes of one that waits."""
    cache = make_cache(**({"trainable_models": "dit"} if "trainable_models" in changes else {}))
    with monkeypatch.context() as patched:
        patched.setattr(BackgroundWriter, "start", lambda self, write: write())
        run(tiny_qwen, cache, tmp_path / "waits", **changes)

    wait, pending = BackgroundWriter.wait, list[Callable[[], None]]()

    def last_moment(self: BackgroundWriter) -> None:
        """Write what was saved before, steps later, as the next save or the end asks whether it is written."""
        while pending:
            pending.pop()()
        wait(self)

    monkeypatch.setattr(BackgroundWriter, "start", lambda self, write: pending.append(write))
    monkeypatch.setattr(BackgroundWriter, "wait", last_moment)
    run(tiny_qwen, cache, tmp_path / "beside", **changes)
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "waits", tmp_path / "beside")
    ]
    names = {name for name in files[0] if name.endswith(".safetensors") or name.endswith("state.json")}
    assert len(names) >= 6 and names == {name for name in files[1] if name in names or "checkpoints" in name}
    for name in names:
        assert files[0][name] == files[1][name], name


@pytest.mark.parametrize("at", [2, 6])
def test_a_save_that_fails_ends_the_run(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """With the error of the system, which names the file: at the step after it, or at the end."""
    failed, sync = threading.Event(), folders.sync_file

    def full(handle: int) -> None:
        if any((tmp_path / "checkpoints").glob(f".tmp-step-{at:08d}-*")):
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(folders, "sync_file", full)
    runtime = Steps(lambda step: failed.wait(SECONDS) and None if step == at + 1 else None)
    with pytest.raises(OSError, match=rf"No space left on device: '.*step-{at:08d}/tensors\.safetensors'"):
        run(tiny_qwen, make_cache(), tmp_path, runtime)
    assert runtime.seen[-1] in ((2, 3, 4) if at == 2 else (6,))
    assert list_checkpoints(str(tmp_path)) == [f"step-{step:08d}" for step in range(2, at, 2)]


def test_another_error_waits_for_the_save_and_tells_of_its_failure(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(step: int) -> None:
        if step == 3:
            broken.set()
            raise ZeroDivisionError("in the step")

    broken, save = threading.Event(), checkpointing.save_checkpoint

    def slow(*arguments: Any) -> str:
        assert broken.wait(SECONDS)
        return save(*arguments)

    monkeypatch.setattr(checkpointing, "save_checkpoint", slow)
    with pytest.raises(ZeroDivisionError):
        run(tiny_qwen, make_cache(), tmp_path / "kept", Steps(fails))
    assert list_checkpoints(str(tmp_path / "kept")) == ["step-00000002"]

    def breaks(*arguments: Any) -> str:
        assert broken.wait(SECONDS)
        raise OSError(errno.EROFS, "Read-only file system")

    broken.clear()
    monkeypatch.setattr(checkpointing, "save_checkpoint", breaks)
    with pytest.raises(ZeroDivisionError) as raised:
        run(tiny_qwen, make_cache(), tmp_path / "lost", Steps(fails))
    assert "the last save could not be written: OSError" in raised.value.__notes__[0]


def test_a_worker_of_an_earlier_command_writes_nothing_more(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver was killed and the same command began again while it lives on: the next save ends it."""
    config = make_config(tiny_qwen, make_cache(), tmp_path, max_steps=8, save_steps=2, log_with="none")
    killed = Lease(str(tmp_path))
    (tmp_path / LEASE).write_bytes(killed.content())
    Start.of(config).begin()
    resumed: list[TrainResult] = []

    def again(step: int) -> None:
        if step == 3 and not resumed:
            while not list_checkpoints(str(tmp_path)):  # that of step 2 is still being written
                time.sleep(0.01)
            (tmp_path / LEASE).unlink()
            with lease(str(tmp_path)):
                Start.of(config).begin()
                resumed.append(run(tiny_qwen, make_cache(), tmp_path, max_steps=6))

    with pytest.raises(TrainingError, match="another command was started on .* this one ends and writes nothing more"):
        run(tiny_qwen, make_cache(), tmp_path, Steps(again), max_steps=8)
    assert resumed[0].started_at == 2 and resumed[0].finished
    assert list_checkpoints(str(tmp_path)) == [f"step-{step:08d}" for step in (2, 4, 6)]
    assert not (tmp_path / "step-8.safetensors").exists()
