"""Which images are made: a pure function of the configuration and the prompts, each under a name of its own."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.data.media import content_hash
from ray_diffsynth.data.prompts import Prompt
from ray_diffsynth.errors import did_you_mean
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.settings import checked_setting
from ray_diffsynth.plan.prompts import GenerateError as GenerateError

IMAGES_FOLDER = "pictures"
PipelineOrClass: TypeAlias = BasePipeline | type[BasePipeline]
"""A family, or one that knows its model's configuration (`BasePipeline.configured`)."""
# Arguments of `__call__` that have flags of their own.
_OWN_FLAGS = ("seed", "rand_device", "cfg_scale")


@dataclass(frozen=True)
class Item:
    """One image: `file` is its path below the output, the rest what `__call__` gets, and the scale of the LoRA.

    `arguments` holds what is asked for; what the family leaves at its default is absent. `images`: parameter -> path
    of the image that it is made from, or several.
    """

    file: str
    prompt: str
    seed: int
    lora_scale: float
    arguments: tuple[tuple[str, Any], ...]
    images: tuple[tuple[str, str | tuple[str, ...]], ...] = ()


def family_defaults(pipeline: PipelineOrClass) -> dict[str, Any]:
    """What the family's `__call__` uses for the number of steps and the guidance where the caller says nothing."""
    parameters = inspect.signature(pipeline.__call__).parameters
    own = getattr(pipeline, "defaults", None)
    found = {}
    for name in ("num_inference_steps", "cfg_scale"):
        default = parameters[name].default if name in parameters else None
        found[name] = getattr(own, name, None) if default in (None, inspect.Parameter.empty) else default
    return found


def makes_videos(pipeline: PipelineOrClass) -> bool:
    """Whether the family's `__call__` returns frames."""
    return "num_frames" in inspect.signature(pipeline.__call__).parameters


def plan_items(
    config: GenerateConfig, prompts: Sequence[Prompt], pipeline: PipelineOrClass, identity: Mapping[str, Any]
) -> list[Item]:
    """The images in order, each once: for every prompt its seeds, for every seed the scales of the LoRA.

    identity: JSON values that decide the pixels beside the item itself (weights, LoRA files, number format); they are
    part of the name, so a run with anything else makes its own images and never takes those of this one.
    """
    items: dict[str, Item] = {}
    for number, prompt in enumerate(prompts):
        for seed in _seeds(config, prompt, number):
            for scale in config.lora_scales:
                item = _item(config, prompt, seed, scale, pipeline, identity)
                items.setdefault(item.file, item)
    return list(items.values())


def check_arguments(items: Sequence[Item], pipeline: PipelineOrClass) -> None:
    """Raise PipelineError for a size, ScheduleError for a number of steps that the family cannot make: now, not when
    the first image is drawn.
    """
    pipe = _instance(pipeline)
    for given in {item.arguments for item in items}:
        found = {"height": pipe.height_division_factor, "width": pipe.width_division_factor, **dict(given)}
        pipe.check_resize_height_width(found["height"], found["width"], found.get("num_frames"))
        if (steps := found.get("num_inference_steps")) is not None:
            pipe.scheduler.check_inference_steps(steps)


def _instance(pipeline: PipelineOrClass) -> BasePipeline:
    return pipeline if isinstance(pipeline, BasePipeline) else pipeline.skeleton()


def call_settings(config: GenerateConfig, pipeline: PipelineOrClass) -> dict[str, Any]:
    """`--pipeline_settings` as arguments of `__call__`. Raises GenerateError for one that it does not take."""
    pipe = _instance(pipeline)
    settings, accepted = pipe.training_settings(), inspect.signature(type(pipe).__call__).parameters
    free = [name for name in settings if name in accepted and name not in _OWN_FLAGS]
    for name in config.pipeline_settings or {}:
        if name not in free:
            raise GenerateError(
                f"--pipeline_settings: {type(pipe).__name__} does not sample by {name!r}; {did_you_mean(name, free)}"
            )
    given = config.pipeline_settings or {}
    return {name: checked_setting(name, value, settings[name]) for name, value in given.items()}


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
    pipeline: PipelineOrClass,
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
        **call_settings(config, pipeline),
    }
    accepted = inspect.signature(pipeline.__call__).parameters
    arguments = {name: value for name, value in asked.items() if value not in (None, "")}
    if unknown := [name for name in arguments if name not in accepted and name != "rand_device"]:
        raise GenerateError(
            f"{type(_instance(pipeline)).__name__} takes no {', '.join(unknown)}; leave it out for this family"
        )
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    given = tuple(sorted(arguments.items()))
    video = makes_videos(pipeline)
    decides = [prompt.prompt, seed, scale, given, config.fps if video else None, dict(identity)]
    decides += [{name: _content(paths) for name, paths in prompt.images}] if prompt.images else []
    name = _name(prompt.prompt, decides)
    file = f"{IMAGES_FOLDER}/{name}.{'mp4' if video else 'png'}"
    return Item(file, prompt.prompt, seed, scale, given, prompt.images)


def _content(paths: str | tuple[str, ...]) -> str | list[str]:
    """Hashes of images. Raises MediaError for one that is not there."""
    return content_hash(paths) if isinstance(paths, str) else [content_hash(path) for path in paths]


def _name(prompt: str, content: Any) -> str:
    """A readable start and a hash of all that decides the image."""
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words}-{digest}" if words else digest


def metadata_rows(config: GenerateConfig, items: Sequence[Item], pipeline: PipelineOrClass) -> list[dict[str, Any]]:
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
                # Lists as JSON, which the dataset's reader understands in a csv.
                **{name: path if isinstance(path, str) else json.dumps(path) for name, path in item.images},
            }
        )
    return rows


def item_facts(item: Item) -> dict[str, Any]:
    """The item as JSON values, for the report."""
    values = asdict(item)
    del values["images"]
    return {**values, "arguments": dict(item.arguments), "pictures": dict(item.images)}
