"""Prompts in; pictures, metadata.csv, a grid and a report out. A run that was ended goes on: each picture once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.generate.painter import PainterSpec
from ray_diffsynth.generate.plan import PICTURES, check_arguments, plan_items
from ray_diffsynth.generate.pool import Painted, paint_all
from ray_diffsynth.generate.prompts import GenerateError, read_prompts
from ray_diffsynth.generate.summary import Made, finish
from ray_diffsynth.models.fingerprint import part_sketch
from ray_diffsynth.models.locate import ModelSource, locate_configured
from ray_diffsynth.models.lora_file import LoraError, check_lora_file, lora_digest
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.calling import picture_params
from ray_diffsynth.pipelines.registry import choose_family, get_pipeline_class
from ray_diffsynth.progress import Progress
from ray_diffsynth.ray_session import ray_session
from ray_diffsynth.resources import Cluster, generator_pool
from ray_diffsynth.storage import absolute, exists, join, list_files


def run(config: GenerateConfig) -> dict[str, Any]:
    """Make what is not there yet; returns the counts that report.json holds too.

    Raises UserErrors of the configuration before Ray starts, and GenerateError at the end if some pictures failed.
    """
    started = time.monotonic()
    source = locate_configured(config, wanted=())
    family = choose_family(config.family, source)
    pipeline = get_pipeline_class(family).configured(source)
    prompts = read_prompts(config, picture_params(pipeline))
    source = locate_configured(config)
    pipeline.check_files(source, pipeline.parts)
    loras = tuple(absolute(path) for path in config.loras)
    items = plan_items(config, prompts, pipeline, _identity(config, family, pipeline, source, loras))
    check_arguments(items, pipeline)
    output = absolute(config.output_path)
    there = {f"{PICTURES}/{name}" for name in list_files(join(output, PICTURES))}
    missing = [item for item in items if item.file not in there]
    spec = PainterSpec(family, source, config.dtype, loras, output, config.fps)
    painted = Painted({}, 0.0)
    if missing:
        with ray_session(config.ray_address, verbose=config.verbose):
            size = generator_pool(config.num_workers, config.resources, len(missing), Cluster.connected())
            done = len(items) - len(missing)
            with Progress("generate", total=len(items), unit="pictures", initial=done) as progress:
                painted = paint_all(missing, spec, size, progress.advance)
    made = Made(family, pipeline, loras, items, len(missing), painted.failures, painted.seconds)
    counts = finish(config, made, output, seconds=time.monotonic() - started)
    if painted.failures:
        first = next(item for item in items if item.file in painted.failures)
        raise GenerateError(
            f"{len(painted.failures)} of {len(items)} pictures failed, the first {first.prompt!r} with seed "
            f"{first.seed}: {painted.failures[first.file]}; the same command tries them again"
        )
    return counts


def _identity(
    config: GenerateConfig, family: str, pipeline: BasePipeline, source: ModelSource, loras: Sequence[str]
) -> dict[str, Any]:
    """What decides the pixels beside the item: the weights, the LoRA files by content, and the number format."""
    for path in loras:
        if not exists(path):
            raise LoraError(f"LoRA file {path} does not exist; check --lora")
        check_lora_file(path)  # raises for what is no LoRA file, before Ray starts
    return {
        "family": family,
        "dtype": config.dtype,
        "weights": {name: part_sketch(source, part.subfolder) for name, part in sorted(pipeline.parts.items())},
        "loras": [lora_digest(path, 16) for path in loras],
    }
