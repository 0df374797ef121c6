"""What the sample images of a run show: its prompts with the sizes, seeds and images that `__call__` gets."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.data.formats import READERS
from ray_diffsynth.data.prompts import Prompt, read_prompt_file
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.calling import image_params, missing_images
from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.storage import absolute, exists
from ray_diffsynth.training.errors import TrainingError

OPTION = "--validation_prompts"


@dataclass(frozen=True)
class SamplePrompt:
    """An image or video of a grid. `arguments`: what `__call__` gets; `images`: parameter -> path, or several."""

    prompt: str
    seed: int
    arguments: tuple[tuple[str, Any], ...] = ()
    images: tuple[tuple[str, str | tuple[str, ...]], ...] = ()


def plan_samples(plan: TrainPlan) -> list[SamplePrompt]:
    """The images of a grid, in order; none without --validation_prompts.

    Raises TrainingError or DatasetError: no prompts, a model that sampling needs and the model folder lacks, an image
    that the family needs; PipelineError for a size and ScheduleError for a number of steps that it cannot make. All
    before anything is loaded.
    """
    given = plan.config.validation_prompts
    if not given:
        return []
    check_models(plan)
    pipe = plan.configured()
    images = image_params(pipe)
    prompts = read_prompts(given, images)
    if lacking := missing_images(prompts, images, option=OPTION):
        raise TrainingError(lacking)
    if plan.config.sample_inference_steps is not None:
        pipe.scheduler.check_inference_steps(plan.config.sample_inference_steps)
    size = _trained_size(plan)
    return [_sample(plan, pipe, size, number, prompt) for number, prompt in enumerate(prompts)]


def read_prompts(given: str, images: Mapping[str, bool]) -> list[Prompt]:
    """The rows of the file `given`, if it is one, else the prompts between its |. Raises TrainingError, DatasetError.

    images: see `image_params`.
    """
    # os.path: unlike pathlib it takes a prompt that is too long for a file's name.
    suffix = os.path.splitext(given.strip())[1].lower()
    is_table = suffix in READERS
    if os.path.isfile(given) or (is_table and "|" not in given and exists(given)):
        return read_prompt_file(given, images, option=OPTION, lines=() if is_table else (suffix,))
    if "|" not in given and given.strip().endswith((".txt", ".md", *READERS)):
        raise TrainingError(
            f"{OPTION} {given} does not exist; give a text file with a prompt a line, a csv or jsonl file with the "
            "column prompt, or the prompts themselves with | between them"
        )
    prompts = [Prompt(part.strip()) for part in given.split("|") if part.strip()]
    if not prompts:
        raise TrainingError(f"{OPTION} {given!r} has no prompt; write one a line, or with | between them")
    return prompts


def check_models(plan: TrainPlan) -> None:
    """Raise TrainingError if a model that sampling needs is not in the model folder: stage 2 may do without it."""
    parts = plan.pipeline.parts
    absent = [name for name, part in parts.items() if not plan.source.has(part.subfolder)]
    if absent:
        raise TrainingError(
            f"{OPTION} needs the whole model, but {', '.join(absent)} is not given; name the whole folder by --model, "
            f"or leave {OPTION} out"
        )


def _trained_size(plan: TrainPlan) -> dict[str, int | None]:
    """The size that the run trains: what its options say, of a cache that of the most samples."""
    config = plan.config
    size = {"height": config.height, "width": config.width, "num_frames": config.num_frames}
    if config.reads_cache:
        buckets = Manifest.load(absolute(config.dataset_base_path)).buckets
        samples: Counter[tuple[int, int, int]] = Counter()
        for name, count in buckets.items():
            bucket = Bucket.parse(name)
            samples[bucket.height, bucket.width, bucket.num_frames] += count
        ((height, width, frames), _) = samples.most_common(1)[0]
        if not (config.height and config.width):
            size |= {"height": height, "width": width}
        size["num_frames"] = config.num_frames or frames
    return size


def _sample(
    plan: TrainPlan, pipe: BasePipeline, size: Mapping[str, int | None], number: int, prompt: Prompt
) -> SamplePrompt:
    config = plan.config
    accepted = inspect.signature(type(pipe).__call__).parameters
    if (prompt.height is None) != (prompt.width is None):
        raise TrainingError(f"{OPTION}: the prompt {prompt.prompt!r} has a height or a width alone; give both")
    own = {"height": prompt.height, "width": prompt.width} if prompt.height else {}
    asked: dict[str, Any] = {**size, "num_frames": size["num_frames"] or pipe.default_num_frames, **own}
    if "num_frames" not in accepted:
        del asked["num_frames"]
    # A setting that has another value in sampling, such as the guidance, is training's alone.
    settings = {name: value for name, value in (config.pipeline_settings or {}).items() if name in accepted}
    asked |= {name: value for name, value in settings.items() if name not in pipe.sampling_settings()}
    asked |= {"num_inference_steps": config.sample_inference_steps, "negative_prompt": prompt.negative_prompt}
    arguments = {name: value for name, value in asked.items() if value is not None}
    if unknown := [name for name in arguments if name not in accepted]:
        raise TrainingError(f"{OPTION}: {type(pipe).__name__} takes no {', '.join(unknown)}; leave it out")
    checked = {"height": pipe.height_division_factor, "width": pipe.width_division_factor, **arguments}
    pipe.check_resize_height_width(checked["height"], checked["width"], checked.get("num_frames"))
    for name, paths in prompt.images:
        for path in (paths,) if isinstance(paths, str) else paths:
            if not exists(path):
                raise TrainingError(f"{OPTION}: the {name} {path} of the prompt {prompt.prompt!r} does not exist")
    seed = config.seed + number if prompt.seed is None else prompt.seed
    return SamplePrompt(prompt.prompt, seed, tuple(sorted(arguments.items())), prompt.images)
