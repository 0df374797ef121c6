"""Whether a checkpoint is of the run that wants to go on from it; if not, in what they differ, in the user's words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ray_diffsynth.config.options import defaults_of, identity_of
from ray_diffsynth.models.lora_file import lora_digest
from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.tasks import task_family
from ray_diffsynth.training.checkpoint import Checkpoint, CheckpointError
from ray_diffsynth.training.data.source import SampleSource

MAX_VALUE_LENGTH = 80
"""Characters of a value in a message."""


def identity(plan: TrainPlan, data: SampleSource) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must share, as JSON values."""
    return {**_without_data(plan), "data": data.identity}


def identity_defaults(plan: TrainPlan) -> dict[str, Any]:
    """What a checkpoint was made with whose version did not have an option yet."""
    return defaults_of(type(plan.config))


def check_chosen(plan: TrainPlan, checkpoint: Checkpoint, where: str) -> None:
    """Raise CheckpointError if the checkpoint that --resume names is of a run with other options: before what lies in
    the output folder is set aside for it. The workers compare the data as well.
    """
    check_identity(checkpoint.identity, _without_data(plan), where, identity_defaults(plan))


def _without_data(plan: TrainPlan) -> dict[str, Any]:
    settings = identity_of(plan.config)
    settings["task"] = task_family(plan.config.task)
    if preset := plan.config.preset_lora_path:  # what is in it counts, not where it lies
        settings["preset_lora_path"] = f"content {lora_digest(preset, 8)}"
    own: dict[str, Any] = {**settings, "family": plan.family, "weights": dict(plan.weights)}
    return dict(json.loads(json.dumps(own)))


def check_identity(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    where: str,
    defaults: Mapping[str, Any] | None = None,
    *,
    positions: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
) -> None:
    """Raise CheckpointError naming every entry in which a checkpoint and the run that wants to go on from it differ.

    An entry that the checkpoint's version did not have yet was as `defaults` says, or None; one that is no more decides
    nothing. positions: of the checkpoint and of this run; what they count (`samples`, `num_epochs`, `max_steps`) stands
    in the message for what only tells that something differs.
    """
    there = {**dict.fromkeys(wanted), **(defaults or {}), **found}
    names = [name for name in sorted(wanted) if there[name] != wanted[name]]
    differences = [text for name in names for text in _describe(name, there[name], wanted[name], *positions)]
    if differences:
        raise CheckpointError(
            f"the checkpoint {where} is of another run ({'; '.join(differences)}); make them equal to go on, or start "
            "anew: with another --output_path (and from these weights with --lora_checkpoint <its newest "
            ".safetensors file>), or with --resume never"
        )


def _describe(
    name: str, there: Any, here: Any, position: Mapping[str, Any], position_here: Mapping[str, Any]
) -> Iterator[str]:
    """The line of a message about one entry."""
    if name == "data" and "samples" in position_here:
        yield _data(position.get("samples"), position_here["samples"])
    elif name == "lr_total_steps":
        yield from _length(there, here, position, position_here)
    elif isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                yield f"{name} of {key}: {_both(there.get(key), here.get(key))}"
    else:
        yield f"{name}: {_both(there, here)}"


def _data(there: int | None, here: int) -> str:
    if there == here:
        return f"data: {here} samples then and now, but not the same ones, or with other content or captions"
    then = "other samples" if there is None else f"{there} samples"
    return f"data: {then} then, {here} now"


def _length(there: Any, here: Any, position: Mapping[str, Any], position_here: Mapping[str, Any]) -> Iterator[str]:
    """A learning rate that falls towards the run's end: its length as the options gave it."""
    options = [
        (name, position.get(name), position_here.get(name))
        for name in ("max_steps", "num_epochs")
        if "max_steps" in position and position.get(name) != position_here.get(name)
    ]
    for name, then, now in options:
        yield f"{name}: {_both(then, now)}"
    if not options:
        yield f"length of the run, over which the learning rate falls: {there} steps there, {here} steps here"
    elif len(options) > 1 or options[0][0] == "num_epochs":
        yield f"which is {there} steps there, {here} here"


def _both(there: Any, here: Any) -> str:
    first, second = _text(there), _text(here)
    if max(len(first), len(second)) > MAX_VALUE_LENGTH:  # from where they differ, with a little before it
        start = max(0, len(os.path.commonprefix([first, second])) - 10)
        first, second = (f"{'…' if start else ''}{text[start:]}" for text in (first, second))
    return f"{_short(first)} there, {_short(second)} here"


def _text(value: Any) -> str:
    if value is None:
        return "nothing"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, bool)) else str(value)


def _short(text: str) -> str:
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…"
