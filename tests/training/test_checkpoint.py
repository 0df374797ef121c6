"""Checkpoints: whole or absent, damage is found, a foreign one is refused."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from ray_diffsynth.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints_folder,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)


def at(step: int) -> Checkpoint:
    tensors = {"trainable/a.lora_A.weight": torch.full((2, 3), step / 3), "optimizer/a/step": torch.tensor(float(step))}
    return Checkpoint(step, {"seed": 0, "manifest": "abc"}, {"epoch": 0}, {"optimizer": {"lr": 0.1 + 0.2}}, tensors)


def same(a: Checkpoint, b: Checkpoint) -> bool:
    equal = all(torch.equal(a.tensors[k], b.tensors[k]) and a.tensors[k].dtype == b.tensors[k].dtype for k in a.tensors)
    return equal and (a.step, a.identity, a.position, a.numbers) == (b.step, b.identity, b.position, b.numbers)


def test_round_trip_and_rotation(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert newest_checkpoint(out) is None
    for step in (5, 10, 100_000_000):
        save_checkpoint(out, at(step), keep=2)
    assert list_checkpoints(out) == ["step-00000010", "step-100000000"]
    found = newest_checkpoint(out)
    assert found is not None
    assert same(found, at(100_000_000))
    assert set(found.part("trainable")) == {"a.lora_A.weight"}


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    out = str(tmp_path)
    save_checkpoint(out, at(5), keep=2)
    save_checkpoint(out, Checkpoint(5, {}, {"epoch": 7}, {}, {"trainable/x": torch.zeros(1)}), keep=2)
    assert newest_checkpoint(out).position == {"epoch": 7}  # type: ignore[union-attr]
    assert sorted(p.name for p in Path(checkpoints_folder(out)).iterdir()) == ["step-00000005"]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty"])
def test_a_damaged_one_is_named_and_the_one_before_used(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = str(tmp_path)
    save_checkpoint(out, at(5), keep=2)
    victim = Path(save_checkpoint(out, at(10), keep=2)) / file
    data = victim.read_bytes()
    if damage == "remove":
        victim.unlink()
    else:
        middle = len(data) - 3
        changed = {
            "truncate": data[:-7],
            "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "empty": b"",
        }
        victim.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(out)
    assert found is not None
    assert same(found, at(5))
    if (file, damage) != ("state.json", "remove"):  # that one is not listed as a checkpoint at all
        assert "step-00000010" in caplog.text
    with pytest.raises(CheckpointError, match="step-00000010"):
        read_checkpoint(str(victim.parent))


def test_a_write_that_dies_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path)
    save_checkpoint(out, at(5), keep=2)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(out, at(10), keep=2)
    assert list_checkpoints(out) == ["step-00000005"]
    save_checkpoint(out, at(10), keep=2)
    assert sorted(p.name for p in Path(checkpoints_folder(out)).iterdir()) == ["step-00000005", "step-00000010"]


def test_a_file_system_that_refuses_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    save_checkpoint(str(tmp_path), at(5), keep=2)
    assert same(newest_checkpoint(str(tmp_path)), at(5))  # type: ignore[arg-type]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = Path(save_checkpoint(str(tmp_path), at(5), keep=1))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "version": 99}))
    with pytest.raises(CheckpointError, match="newer ray_diffsynth"):
        read_checkpoint(str(folder))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_is_written_stays_and_a_past_that_did_not_happen_goes(tmp_path: Path, keep: int) -> None:
    """A run that goes on from step 10, as 100 is damaged, must not lose its new checkpoints for that one."""
    out = str(tmp_path)
    for step in (10, 100):
        save_checkpoint(out, at(step), keep=5)
    victim = tmp_path / "checkpoints/step-00000100/tensors.safetensors"
    victim.write_bytes(victim.read_bytes()[:-9])
    for done in ((20,), (20, 30), (20, 30, 40)):
        save_checkpoint(out, at(done[-1]), keep=keep)
        assert list_checkpoints(out) == [f"step-{step:08d}" for step in (10, *done)[-keep:]]
    assert newest_checkpoint(out).step == 40  # type: ignore[union-attr]


def test_none_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    out = str(tmp_path)
    for step in (1, 2):
        folder = save_checkpoint(out, at(step), keep=2)
        (Path(folder) / "tensors.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints.*step-00000002.*--resume never"):
        newest_checkpoint(out)


def test_object_store() -> None:
    out = "memory://checkpoint-test/run"
    for step in (1, 2, 3):
        save_checkpoint(out, at(step), keep=2)
    assert list_checkpoints(out) == ["step-00000002", "step-00000003"]
    assert same(newest_checkpoint(out), at(3))  # type: ignore[arg-type]
