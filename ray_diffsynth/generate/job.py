"""Prompts in; images, metadata.csv, a grid and a report out. A run that was ended goes on: each image once."""

from __future__ import annotations

import time
from functools import partial
from operator import attrgetter
from typing import Any

from ray_diffsynth.cluster.generators import GeneratorPool, generator_pool
from ray_diffsynth.cluster.request import requester
from ray_diffsynth.cluster.session import ray_session
from ray_diffsynth.cluster.wait import sized_when_there
from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.generate.items import IMAGES_FOLDER, check_arguments, plan_items
from ray_diffsynth.generate.pool import Painted, paint_all
from ray_diffsynth.generate.summary import Made, write_results
from ray_diffsynth.models.lora_file import LoraError, check_lora_file, lora_digest
from ray_diffsynth.plan.prompts import GenerateError
from ray_diffsynth.plan.run_plan import GeneratePlan, RunPlan
from ray_diffsynth.progress import Progress
from ray_diffsynth.ray_compat import autoscaler
from ray_diffsynth.storage import exists, join, list_files


def run(config: GenerateConfig) -> dict[str, Any]:
    """Make what is not there yet; returns the counts that report.json holds too.

    Raises UserErrors of the configuration before Ray starts, and GenerateError at the end if some images failed.
    """
    started = time.monotonic()
    plan = RunPlan.resolve(config)
    pipeline = plan.configured()
    items = plan_items(config, plan.prompts, pipeline, _identity(plan))
    check_arguments(items, pipeline)
    output = plan.output_path
    there = {f"{IMAGES_FOLDER}/{name}" for name in list_files(join(output, IMAGES_FOLDER))}
    missing = [item for item in items if item.file not in there]
    painted = Painted({}, 0.0)
    if missing:
        session = ray_session(config.ray_address, verbose=config.verbose, env=config.env_names)
        with session as environment:
            size = _wait_for_pool(config, len(missing), output)
            done = len(items) - len(missing)
            with Progress("generate", total=len(items), unit="images", initial=done) as progress:
                painted = paint_all(missing, plan, size, progress.advance, environment)
    made = Made(plan.family, pipeline, plan.loras, items, len(missing), painted.failures, painted.seconds)
    counts = write_results(config, made, output, seconds=time.monotonic() - started)
    if painted.failures:
        first = next(item for item in items if item.file in painted.failures)
        raise GenerateError(
            f"{len(painted.failures)} of {len(items)} images failed, the first {first.prompt!r} with seed "
            f"{first.seed}: {painted.failures[first.file]}; the same command tries them again"
        )
    return counts


def _wait_for_pool(config: GenerateConfig, items: int, output: str) -> GeneratorPool:
    """The actors, once there is room for them."""
    size = partial(generator_pool, config, items, growing=autoscaler() is not None)
    with requester(f"generate {output}") as wanted:
        pool: GeneratorPool = sized_when_there(size, attrgetter("demand"), wanted, minutes=config.wait_minutes)
    return pool


def _identity(plan: GeneratePlan) -> dict[str, Any]:
    """What decides the pixels beside the item: the weights, the LoRA files by content, and the number format."""
    for path in plan.loras:
        if not exists(path):
            raise LoraError(f"LoRA file {path} does not exist; check --lora")
        check_lora_file(path)  # raises for what is no LoRA file, before Ray starts
    return {
        "family": plan.family,
        "dtype": plan.config.dtype,
        "weights": dict(plan.weights),
        "loras": [lora_digest(path, 16) for path in plan.loras],
    }
