"""Checkpoints on disk: one folder a step, whole or absent, checked when read.

    <output_path>/checkpoints/step-00000123/tensors.safetensors   everything that is a tensor
    <output_path>/checkpoints/step-00000123/state.json            the rest, and a checksum over both

A folder is written under another name, synced and renamed; a process that dies leaves a `.tmp-…` folder, which the next
save removes. On an object store, which has no rename, state.json is written last and makes the checkpoint count.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load

from ray_diffsynth.errors import UserError
from ray_diffsynth.models.tensor_file import tensor_file
from ray_diffsynth.storage import join, list_files, read_bytes, remove_folder, write_folder_atomic

logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 1
STATE_FILE = "state.json"
TENSOR_FILE = "tensors.safetensors"
_NAME = re.compile(r"^step-(\d{8,})$")


class CheckpointError(UserError):
    """A checkpoint that is damaged, absent, or of another run."""


@dataclass(frozen=True)
class Checkpoint:
    """The full state of a run after optimizer step `step`.

    identity: what must be equal for the run to go on from here (see `identity.check_identity`), JSON values.
    position: where the run is, JSON values; the next batch follows from it, or a message counts with it.
    numbers: state that is no tensor (hyperparameters of the optimizer, a gradient scaler, …), JSON values by part.
    tensors: `<part>/<name>` -> tensor, parts being `trainable`, `optimizer`, later `ema`.
    """

    step: int
    identity: dict[str, Any]
    position: dict[str, Any]
    numbers: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}"

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one part, without its prefix."""
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(f"{name}/")}

    def snapshot(self) -> Checkpoint:
        """A copy in main memory, which the steps that follow leave as it is."""
        tensors = {
            name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in self.tensors.items()
        }
        rest = copy.deepcopy((self.identity, self.position, self.numbers))
        return Checkpoint(self.step, *rest, tensors)


def checkpoints_folder(output_path: str) -> str:
    return join(output_path, "checkpoints")


def save_checkpoint(output_path: str, checkpoint: Checkpoint, keep: int) -> str:
    """Write `checkpoint` atomically; it and the `keep` - 1 before it stay. Returns its folder.

    Checkpoints of later steps go: the run has gone on from an earlier one, so they are not of its past.
    """
    folder = checkpoints_folder(output_path)
    target = join(folder, checkpoint.name)
    data = tensor_file({name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()})
    body = {
        "version": CHECKPOINT_VERSION,
        "step": checkpoint.step,
        "identity": checkpoint.identity,
        "position": checkpoint.position,
        "numbers": checkpoint.numbers,
        "tensors": {"bytes": sum(map(len, data)), "blake2b": _digest(data)},
    }
    state = json.dumps({**body, "checksum": _checksum(body)}, indent=1).encode()
    write_folder_atomic(target, {TENSOR_FILE: data, STATE_FILE: state})
    there = list_checkpoints(output_path)
    before = there[: there.index(checkpoint.name)]
    for name in there:
        if name != checkpoint.name and name not in before[max(0, len(before) - keep + 1) :]:
            remove_folder(join(folder, name))
    return target


def list_checkpoints(output_path: str) -> list[str]:
    """Names of the checkpoints in a run's folder, oldest first; they may be damaged."""
    files = list_files(checkpoints_folder(output_path), suffix=STATE_FILE, recursive=True)
    names = {file.split("/")[0] for file in files if file.count("/") == 1}
    return sorted((n for n in names if _NAME.match(n)), key=lambda n: int(n.removeprefix("step-")))


def read_state(folder: str) -> dict[str, Any]:
    """The part of a checkpoint that is no tensor: step, identity, position, numbers. Raises CheckpointError."""
    path = join(folder, STATE_FILE)
    try:
        state: dict[str, Any] = json.loads(read_bytes(path))
        checksum = state.pop("checksum")
        if state["version"] > CHECKPOINT_VERSION:
            raise CheckpointError(f"{folder} was written by a newer ray_diffsynth (format {state['version']}); upgrade")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder} is no checkpoint: {STATE_FILE} is absent; a checkpoint is a folder checkpoints/step-… of a run"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if checksum != _checksum(state):
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    return state


def read_checkpoint(folder: str) -> Checkpoint:
    """The checkpoint in `folder`. Raises CheckpointError if it is absent, damaged or of a newer version."""
    state = read_state(folder)
    path, wanted = join(folder, TENSOR_FILE), state["tensors"]
    try:
        data = read_bytes(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(data) != wanted["bytes"]:
        raise CheckpointError(f"{path} is damaged: {len(data)} of {wanted['bytes']} bytes")
    if _digest([data]) != wanted["blake2b"]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    return Checkpoint(state["step"], state["identity"], state["position"], state["numbers"], load(data))


def newest_checkpoint(output_path: str) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named in a warning and passed over. None if there is none.

    Raises CheckpointError when not one of them can be read: starting at step 0 would undo what they stand for.
    """
    problems: list[str] = []
    names = list_checkpoints(output_path)
    for name in reversed(names):
        try:
            found = read_checkpoint(join(checkpoints_folder(output_path), name))
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("%s; trying the checkpoint before it", problem)
        return found
    if names:
        raise CheckpointError(
            f"none of the {len(names)} checkpoints in {checkpoints_folder(output_path)} can be used "
            f"({'; '.join(problems)}); restore one, or set them aside and start anew with --resume never"
        )
    return None


def _digest(data: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in data:
        digest.update(piece)
    return digest.hexdigest()


def _checksum(body: Mapping[str, Any]) -> str:
    return _digest([json.dumps(body, sort_keys=True).encode()])
