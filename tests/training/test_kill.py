"""SIGKILL and SIGTERM of real processes, without Ray: whatever is killed when, resuming ends in the same bytes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.training.checkpoint import list_checkpoints, newest_checkpoint
from ray_diffsynth.training.report.metrics_log import read_metrics
from tests.training.conftest import CacheMaker
from tests.training.helpers import Runs, make_config, train_here

pytestmark = pytest.mark.slow

# Ten samples in batches of two: five steps an epoch. Everything that has a state is on.
OPTIONS: dict[str, Any] = {
    "max_steps": 8,
    "num_epochs": 2,
    "batch_size": 2,
    "save_steps": 2,
    "keep_checkpoints": 8,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "ema_decay": 0.9,
    "lora_dropout": 0.1,
    "validation_samples": 1,
    "log_with": "none",
}


@pytest.fixture(scope="session")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody killed."""
    output = tmp_path_factory.mktemp("whole")
    assert go(runs, output) == 0
    return output


def go(runs: Runs, output: Path, kill: dict[str, int] | None = None, term: int | None = None, **more: Any) -> int:
    """The exit code; -9 after SIGKILL."""
    (code,) = runs(output, kill=kill, term=term, **{**OPTIONS, **more})
    return code


def assert_same(output: Path, whole: Path) -> None:
    """The same LoRA files, averages, checkpoint and losses, bit for bit."""
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert names == sorted(path.name for path in output.glob("*.safetensors"))
    assert "step-8.safetensors" in names and "step-8.ema.safetensors" in names
    for name in (*names, "checkpoints/step-00000008/tensors.safetensors"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("loss", "validation_loss", "learning_rate", "grad_norm"):
        found = [[line.get(name) for line in read_metrics(str(folder))] for folder in (output, whole)]
        assert found[0] == found[1], name
    assert sum("validation_loss" in line for line in read_metrics(str(whole))) == 4


@pytest.mark.parametrize(
    ("kill", "kept"),
    [
        ({"step": 1}, 0),
        ({"step": 4}, 2),  # within an epoch, between two checkpoints
        ({"step": 6}, 4),  # the first step of the second epoch
        ({"fsync": 6}, 2),  # the second checkpoint: tensors on disk, state.json not yet
        ({"rename": 2}, 2),  # the second checkpoint: written, but not under its name
        ({"fsync": 8}, 4),  # the second checkpoint has its name, its folder is not synced yet
        # The steps go on while a checkpoint is written; killed meanwhile, the one before it counts.
        ({"fsync": 1, "until": 4}, 0),
        ({"fsync": 5, "until": 6}, 2),
        ({"rename": 3, "until": 8}, 4),
    ],
    ids=lambda value: str(value),
)
def test_a_killed_run_goes_on_bit_for_bit(
    runs: Runs, whole: Path, tmp_path: Path, kill: dict[str, int], kept: int
) -> None:
    assert go(runs, tmp_path, kill) == -9
    found = newest_checkpoint(str(tmp_path))
    assert (found.step if found else 0) == kept
    if "until" in kill:
        assert read_metrics(str(tmp_path))[-1]["step"] == kill["until"] - 1 > kept + 2
    assert go(runs, tmp_path) == 0
    assert_same(tmp_path, whole)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_killed_again_and_again(runs: Runs, whole: Path, tmp_path: Path) -> None:
    codes = [go(runs, tmp_path, {"step": 3}) for _ in range(3)]
    assert codes == [-9, -9, -9]
    assert newest_checkpoint(str(tmp_path)).step == 6  # type: ignore[union-attr]
    assert go(runs, tmp_path) == 0
    assert_same(tmp_path, whole)


def test_sigterm_saves_and_says_so_by_its_exit_code(runs: Runs, whole: Path, tmp_path: Path) -> None:
    assert go(runs, tmp_path, term=3) == 143
    assert list_checkpoints(str(tmp_path))[-1] == "step-00000004"  # asked within step 3, it ends with the next
    assert json.loads((tmp_path / "report.json").read_text())["counts"]["steps"] == 4
    assert go(runs, tmp_path) == 0
    assert_same(tmp_path, whole)


def test_a_truncated_checkpoint_is_said_and_the_one_before_used(
    runs: Runs, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert go(runs, tmp_path, max_steps=6, lr_scheduler="constant") == 0
    victim = tmp_path / "checkpoints/step-00000006/tensors.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1000])
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(str(tmp_path)).step == 4  # type: ignore[union-attr]
    assert "step-00000006/tensors.safetensors is damaged" in caplog.text and "the checkpoint before it" in caplog.text
    assert go(runs, tmp_path, lr_scheduler="constant") == 0
    assert go(runs, tmp_path / "other", lr_scheduler="constant") == 0
    name = "step-8.safetensors"
    assert (tmp_path / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("kill", [{"step": 1}, {"step": 6}, {"fsync": 6}], ids=str)
def test_never_goes_on_after_a_kill_and_starts_anew_when_it_has_finished(
    runs: Runs, whole: Path, tmp_path: Path, kill: dict[str, int]
) -> None:
    """The very command that was killed goes on from its own checkpoints; what lay there before is not mixed in."""
    assert go(runs, tmp_path, max_steps=4, seed=3, lr_scheduler="constant") == 0
    (tmp_path / "samples").mkdir()
    assert go(runs, tmp_path, kill, resume="never") == -9
    found = newest_checkpoint(str(tmp_path))
    assert go(runs, tmp_path, resume="never") == 0
    assert_same(tmp_path, whole)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["result"]["started_at"] == (found.step if found else 0)
    assert report["lora"]["file"] == "step-8.safetensors" and report["training"]["logged_steps"] == 8
    assert (tmp_path / "previous-1/step-2.safetensors").exists() and (tmp_path / "previous-1/samples").exists()
    if "step" in kill:
        return
    assert go(runs, tmp_path, resume="never") == 0  # finished: the same command is another run
    assert_same(tmp_path, whole)
    assert_same(tmp_path / "previous-2", whole)


def test_a_chosen_checkpoint_is_started_from_once(runs: Runs, whole: Path, tmp_path: Path) -> None:
    assert go(runs, tmp_path) == 0
    chosen = str(tmp_path / "checkpoints/step-00000004")
    assert go(runs, tmp_path, {"step": 3}, resume=chosen) == -9
    assert newest_checkpoint(str(tmp_path)).step == 6  # type: ignore[union-attr]
    assert not (tmp_path / "step-8.safetensors").exists()
    assert go(runs, tmp_path, resume=chosen) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["result"]["started_at"] == 6 and report["training"]["logged_steps"] == 8
    for name in ("step-8.safetensors", "checkpoints/step-00000008/tensors.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_going_on_from_a_chosen_checkpoint(runs: Runs, whole: Path, tmp_path: Path) -> None:
    """--resume <path>: the run goes on from there, in its own folder; the earlier checkpoints are set aside."""
    chosen = whole / "checkpoints/step-00000004"
    assert go(runs, tmp_path, resume=str(chosen)) == 0
    name = "checkpoints/step-00000008/tensors.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_another_length_of_a_falling_learning_rate_is_refused(
    runs: Runs, whole: Path, tiny_qwen: Path, make_cache: CacheMaker
) -> None:
    from ray_diffsynth.training.checkpoint import CheckpointError

    config = make_config(tiny_qwen, make_cache(), whole, **{**OPTIONS, "max_steps": 9})
    with pytest.raises(CheckpointError, match=r"\(max_steps: 8 there, 9 here\)"):
        train_here(config)
