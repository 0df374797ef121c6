"""Which pictures are made: a pure function of the configuration and the prompts, each under a name of its own."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.data import storage
from ray_diffsynth.data.formats import READERS, DatasetError
from ray_diffsynth.errors import UserError, did_you_mean
from ray_diffsynth.pipelines.base import BasePipeline

PICTURES = "pictures"
OWN_COLUMNS = ("negative_prompt", "seed", "height", "width")
"""Columns of a file of prompts that a row may have beside `prompt`."""


class GenerateError(UserError):
    """Pictures that cannot be made, or were not."""


@dataclass(frozen=True)
class Prompt:
    """One row of the prompts; what is None is the configuration's."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Item:
    """One picture: `file` is its path below the output, the rest what `__call__` gets, and the scale of the LoRA.

    `arguments` holds what is asked for; what the family leaves at its default is absent.
    """

    file: str
    prompt: str
    seed: int
    lora_scale: float
    arguments: tuple[tuple[str, Any], ...]


def read_prompts(config: GenerateConfig) -> list[Prompt]:
    """The prompts in order. Raises DatasetError that names the line of a row that cannot be used."""
    if config.prompt is not None:
        return [Prompt(config.prompt)]
    path = str(config.prompt_path)
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".txt":
        lines = storage.read_bytes(path).decode("utf-8-sig").splitlines() if storage.exists(path) else []
        found = [Prompt(line.strip()) for line in lines if line.strip()]
    elif suffix in READERS:
        raw = READERS[suffix](path)
        if "prompt" not in raw.columns:
            raise DatasetError(f"{path} has no column 'prompt'; {did_you_mean('prompt', raw.columns)}")
        found = [_prompt(row.values, row.error, row.source) for row in raw.rows]
    else:
        raise DatasetError(f"{path} is no file of prompts; supported are .txt, {', '.join(READERS)}")
    if not found:
        raise DatasetError(f"{path} does not exist or holds no prompt; check --prompt_path")
    return found


def _prompt(values: Mapping[str, Any] | None, error: str, source: str) -> Prompt:
    if values is None:
        raise DatasetError(f"{source}: {error}")
    if not isinstance(values.get("prompt"), str):
        raise DatasetError(f"{source}: the column 'prompt' holds no text")
    given = {name: values[name] for name in OWN_COLUMNS if values.get(name) not in (None, "")}
    for name in ("seed", "height", "width"):
        if name in given:
            text = str(given[name]).strip().removesuffix(".0")
            if not (text.isascii() and text.isdigit()):
                raise DatasetError(f"{source}: the column {name!r} holds {given[name]!r}, not a whole number")
            given[name] = int(text)
    return Prompt(values["prompt"], **given)


def family_defaults(pipeline: type[BasePipeline]) -> dict[str, Any]:
    """What the family's `__call__` uses for the number of steps and the guidance where the caller says nothing."""
    parameters = inspect.signature(pipeline.__call__).parameters
    own = getattr(pipeline, "defaults", None)
    found = {}
    for name in ("num_inference_steps", "cfg_scale"):
        default = parameters[name].default if name in parameters else None
        found[name] = getattr(own, name, None) if default in (None, inspect.Parameter.empty) else default
    return found


def makes_videos(pipeline: type[BasePipeline]) -> bool:
    """Whether the family's `__call__` returns frames."""
    return "num_frames" in inspect.signature(pipeline.__call__).parameters


def plan_items(
    config: GenerateConfig, prompts: Sequence[Prompt], pipeline: type[BasePipeline], identity: Mapping[str, Any]
) -> list[Item]:
    """The pictures in order, each once: for every prompt its seeds, for every seed the scales of the LoRA.

    identity: JSON values that decide the pixels beside the item itself (weights, LoRA files, number format); they are
    part of the name, so a run with anything else makes its own pictures and never takes those of this one.
    """
    items: dict[str, Item] = {}
    for number, prompt in enumerate(prompts):
        for seed in _seeds(config, prompt, number):
            for scale in config.lora_scales:
                item = _item(config, prompt, seed, scale, pipeline, identity)
                items.setdefault(item.file, item)
    return list(items.values())


def _seeds(config: GenerateConfig, prompt: Prompt, number: int) -> Sequence[int]:
    if prompt.seed is None and config.seed_list:
        return config.seed_list
    count = config.images_per_prompt
    first = config.seed + number * count if prompt.seed is None else prompt.seed
    return range(first, first + count)


def _item(
    config: GenerateConfig,
    prompt: Prompt,
    seed: int,
    scale: float,
    pipeline: type[BasePipeline],
    identity: Mapping[str, Any],
) -> Item:
    asked = {
        "negative_prompt": config.negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt,
        "num_inference_steps": config.num_inference_steps,
        "cfg_scale": config.cfg_scale,
        "height": prompt.height or config.height,
        "width": prompt.width or config.width,
        "rand_device": config.rand_device,
        "num_frames": config.num_frames,
    }
    accepted = inspect.signature(pipeline.__call__).parameters
    arguments = {name: value for name, value in asked.items() if value not in (None, "")}
    if unknown := [name for name in arguments if name not in accepted and name != "rand_device"]:
        raise GenerateError(f"{pipeline.__name__} takes no {', '.join(unknown)}; leave it out for this family")
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    given = tuple(sorted(arguments.items()))
    video = makes_videos(pipeline)
    name = _name(prompt.prompt, [prompt.prompt, seed, scale, given, config.fps if video else None, dict(identity)])
    return Item(f"{PICTURES}/{name}.{'mp4' if video else 'png'}", prompt.prompt, seed, scale, given)


def _name(prompt: str, content: Any) -> str:
    """A readable start and a hash of all that decides the picture."""
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words}-{digest}" if words else digest


def metadata_rows(config: GenerateConfig, items: Sequence[Item], pipeline: type[BasePipeline]) -> list[dict[str, Any]]:
    """Rows of metadata.csv. `num_inference_steps` and `cfg_scale` are the student's, as direct_distill reads them."""
    column = "video" if makes_videos(pipeline) else "image"
    defaults = family_defaults(pipeline)
    rows = []
    for item in items:
        arguments = {**defaults, **dict(item.arguments)}
        rows.append(
            {
                column: item.file,
                "prompt": item.prompt,
                "seed": item.seed,
                "rand_device": config.rand_device,
                "num_inference_steps": config.student_steps,
                "cfg_scale": 1,
                "negative_prompt": arguments.get("negative_prompt", ""),
                "teacher_num_inference_steps": arguments["num_inference_steps"],
                "teacher_cfg_scale": arguments["cfg_scale"],
                "lora_scale": item.lora_scale if config.loras else "",
            }
        )
    return rows


def describe(item: Item) -> dict[str, Any]:
    """The item as JSON values, for the report."""
    return {**asdict(item), "arguments": dict(item.arguments)}
