"""Where a run begins: anew, at a chosen checkpoint, or where an earlier attempt came to; and what is set aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.storage import StorageError, exists, join, list_folders, read_bytes, write_bytes_atomic
from ray_diffsynth.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    newest_checkpoint,
    save_checkpoint,
)
from ray_diffsynth.training.start import Start, mark_finished, mark_going_on
from tests.training.helpers import make_config

LEFT = (
    *("metrics.jsonl", "metrics.csv", "report.json", "report.html", "epoch-4.safetensors", "step-100.safetensors"),
    *("step-100.ema.safetensors", "step-100.text_encoder.safetensors", "samples/step-00000100.png", ".wandb-run"),
    *("tensorboard/events.out.tfevents.1", "nonfinite-step-3.json"),
)
USERS = ("notes.txt", "my_lora.safetensors", "prompts.txt", "cache/manifest.json", "step-by-step.safetensors")


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def config(out: str, **changes: Any) -> TrainConfig:
    return make_config(Path("model"), Path("data"), Path("out"), **{"max_steps": 8, "output_path": out, **changes})


def begin(out: str, **changes: Any) -> Start:
    start = Start.of(config(out, **changes))
    start.begin()
    return start


def train(out: str, *steps: int) -> None:
    """What a run leaves at these steps."""
    for step in steps:
        save_checkpoint(out, Checkpoint(step, {}, {}, {}, {"trainable/a": torch.full((2,), float(step))}), keep=9)
    for name in (*LEFT, *USERS):
        write_bytes_atomic(join(out, name), name.encode())


def contents(folder: str) -> set[str]:
    root = Path(folder)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_never_sets_everything_of_the_earlier_run_aside_and_nothing_else(
    out: str, caplog: pytest.LogCaptureFixture
) -> None:
    begin(out)
    train(out, 4)
    before = {name: (Path(out) / name).read_bytes() for name in contents(out)}
    assert not begin(out, resume="never").goes_on
    assert contents(out) - {f"previous-1/{name}" for name in before} == {*USERS, "run.json"}
    for name, data in before.items():
        place = name if name in USERS else f"previous-1/{name}"
        assert (Path(out) / place).read_bytes() == data, name
    assert "set the files of the earlier run aside" in caplog.text and f"{out}/previous-1" in caplog.text
    train(out, 2)
    begin(out, resume="never", seed=5)
    assert list_folders(out) == ["cache", "previous-1", "previous-2"] and not list_checkpoints(out)


def test_the_same_command_with_never_goes_on_until_it_has_finished(out: str) -> None:
    begin(out, resume="never")
    assert begin(out, resume="never").goes_on  # killed before its first checkpoint
    train(out, 2, 4)
    again = begin(out, resume="never", num_workers=3, ray_address="auto", verbose=True)  # on other machines
    assert again.goes_on and newest_checkpoint(out).step == 4  # type: ignore[union-attr]
    assert exists(join(out, "metrics.jsonl")) and "previous-1" not in list_folders(out)
    mark_finished(out)
    assert not begin(out, resume="never").goes_on and not list_checkpoints(out)
    assert exists(join(out, "previous-1/checkpoints/step-00000004/state.json"))


@pytest.mark.parametrize("changes", [{"max_steps": 9}, {"learning_rate": 1e-3}, {"save_steps": 1}])
def test_another_command_with_never_starts_anew(out: str, changes: dict[str, Any]) -> None:
    begin(out, resume="never")
    train(out, 2)
    assert not begin(out, resume="never", **changes).goes_on
    assert not list_checkpoints(out)


def test_never_after_a_run_that_auto_began_starts_anew(out: str) -> None:
    begin(out)
    train(out, 2)
    assert begin(out).goes_on
    assert not begin(out, resume="never").goes_on


def test_auto_after_never_goes_on_and_takes_over_when_it_says_more(out: str) -> None:
    begin(out, resume="never")
    train(out, 2)
    assert begin(out).goes_on
    assert begin(out, resume="never").goes_on
    assert begin(out, max_steps=20).goes_on
    assert Start.of(config(out, resume="never")).goes_on  # the checkpoint may still refuse that command
    mark_going_on(config(out, max_steps=20))  # another length: now it is this command's run
    assert not Start.of(config(out, resume="never")).goes_on


def test_a_chosen_checkpoint_is_gone_back_to_once(out: str) -> None:
    begin(out)
    train(out, 2, 4, 6)
    chosen = f"{out}/checkpoints/step-00000002"
    assert not begin(out, resume=chosen).goes_on
    assert list_checkpoints(out) == ["step-00000002"]
    assert exists(join(out, "metrics.jsonl"))  # its past; the loop cuts what comes after
    assert not exists(join(out, "epoch-4.safetensors")) and not exists(join(out, "samples"))
    train(out, 4)
    assert begin(out, resume=chosen).goes_on and list_checkpoints(out) == ["step-00000002", "step-00000004"]
    mark_finished(out)
    assert not begin(out, resume=chosen).goes_on and list_checkpoints(out) == ["step-00000002"]


def test_a_checkpoint_that_was_set_aside_is_found_there(out: str) -> None:
    """A kill between setting aside and the copy of the chosen one."""
    begin(out)
    train(out, 2, 4)
    begin(out, resume="never")
    start = begin(out, resume=f"{out}/checkpoints/step-00000004")
    assert start.chosen is not None and newest_checkpoint(out).step == 4  # type: ignore[union-attr]


def test_a_chosen_checkpoint_of_another_folder(out: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    train(other, 3)
    begin(out, resume=f"{other}/checkpoints/step-00000003")
    assert list_checkpoints(out) == ["step-00000003"] and not exists(join(out, "metrics.jsonl"))
    assert list_checkpoints(other) == ["step-00000003"]
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Start.of(config(out, resume=str(tmp_path / "nothing")))


def test_auto_without_checkpoints_does_not_mix_in_what_lies_there(out: str) -> None:
    train(out)
    assert not begin(out).goes_on and exists(join(out, "previous-1/step-100.safetensors"))
    write_bytes_atomic(join(out, "metrics.jsonl"), b"its own")  # killed before its first checkpoint
    assert begin(out).goes_on and read_bytes(join(out, "metrics.jsonl")) == b"its own"
    assert not begin(out, learning_rate=1e-3).goes_on
    assert read_bytes(join(out, "previous-2/metrics.jsonl")) == b"its own"


def test_an_older_versions_run_goes_on(out: str) -> None:
    train(out, 2)
    assert begin(out).goes_on
    mark_going_on(config(out))
    assert json.loads(read_bytes(join(out, "run.json")))["finished"] is False


def test_a_folder_without_a_training_is_left_as_it_is(out: str) -> None:
    """A report alone may be that of stage 1 in the same folder."""
    for name in ("report.json", "manifest.json", "picture.png"):
        write_bytes_atomic(join(out, name), b"x")
    begin(out, resume="never")
    assert contents(out) == {"report.json", "manifest.json", "picture.png", "run.json"}


@pytest.mark.parametrize("option", ["lora_checkpoint", "preset_lora_path"])
def test_a_lora_that_the_run_needs_is_not_set_aside(out: str, option: str) -> None:
    train(out, 2)
    before = contents(out)
    with pytest.raises(CheckpointError, match=f"--{option} .*epoch-4.safetensors is a file of the earlier run"):
        begin(out, resume="never", **{option: f"{out}/epoch-4.safetensors"})
    assert contents(out) == before
    begin(out, resume="never", **{option: f"{out}/my_lora.safetensors"})


def test_a_damaged_marker_is_as_none(out: str, caplog: pytest.LogCaptureFixture) -> None:
    begin(out, resume="never")
    train(out, 2)
    write_bytes_atomic(join(out, "run.json"), b'{"resume": 1')
    assert not begin(out, resume="never").goes_on
    assert "run.json is left out of account" in caplog.text


def test_never_leaves_what_is_damaged_as_its_message_says(out: str) -> None:
    begin(out, resume="never")
    train(out, 2)
    write_bytes_atomic(join(out, "checkpoints/step-00000002/tensors.safetensors"), b"x")
    with pytest.raises(CheckpointError, match="--resume never"):
        newest_checkpoint(out)
    assert not begin(out, resume="never").goes_on and not list_checkpoints(out)


def test_on_an_object_store_too() -> None:
    out = "memory://start-test/out"
    begin(out)
    train(out, 2)
    begin(out, resume="never")
    assert not list_checkpoints(out) and not exists(join(out, "metrics.jsonl"))
    assert read_bytes(join(out, "previous-1/step-100.safetensors")) == b"step-100.safetensors"
    assert list_checkpoints(join(out, "previous-1")) == ["step-00000002"]
    assert begin(out, resume="never").goes_on


def test_a_store_that_does_not_answer_is_not_a_run_that_is_not_there(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(out, resume="never")
    train(out, 2)

    def unreachable(path: str) -> bytes:
        raise StorageError(f"{path} cannot be reached")

    monkeypatch.setattr("ray_diffsynth.training.start.read_bytes", unreachable)
    with pytest.raises(StorageError, match="run.json cannot be reached"):
        begin(out, resume="never")
    assert list_checkpoints(out) == ["step-00000002"]
