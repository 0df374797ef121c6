"""Prompts in; pictures, metadata.csv and grid.png out. A run that was ended goes on: each picture is made once."""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.data.media import load_image
from ray_diffsynth.data.storage import absolute, exists, join, list_files, read_bytes, write_bytes_atomic
from ray_diffsynth.data.video import load_first_frame
from ray_diffsynth.generate.grid import LIMIT, columns_of, draw_grid
from ray_diffsynth.generate.painter import PainterSpec, png
from ray_diffsynth.generate.plan import (
    PICTURES,
    GenerateError,
    Item,
    describe,
    metadata_rows,
    plan_items,
    read_prompts,
)
from ray_diffsynth.generate.pool import paint_all, pool_size
from ray_diffsynth.models.fingerprint import part_sketch
from ray_diffsynth.models.locate import ModelSource, locate_model
from ray_diffsynth.models.lora_file import LoraError
from ray_diffsynth.pipelines.base import BasePipeline
from ray_diffsynth.pipelines.registry import family_of, get_pipeline_class
from ray_diffsynth.progress import Progress
from ray_diffsynth.ray_session import ray_session
from ray_diffsynth.report import write_report


def run(config: GenerateConfig) -> dict[str, Any]:
    """Make what is not there yet; returns the counts that report.json holds too.

    Raises UserErrors of the configuration before Ray starts, and GenerateError at the end if some pictures failed.
    """
    started = time.monotonic()
    source = locate_model(
        config.model,
        model_id_with_origin_paths=config.model_id_with_origin_paths,
        model_paths=config.model_paths,
        tokenizer_path=config.tokenizer_path,
        processor_path=config.processor_path,
    )
    family = config.family or family_of(source.root)
    pipeline = get_pipeline_class(family)
    loras = tuple(absolute(path) for path in config.loras)
    items = plan_items(config, read_prompts(config), pipeline, _identity(config, family, pipeline, source, loras))
    output = absolute(config.output_path)
    there = {f"{PICTURES}/{name}" for name in list_files(join(output, PICTURES))}
    missing = [item for item in items if item.file not in there]
    spec = PainterSpec(family, source, config.dtype, loras, output, config.fps)
    failures: dict[str, str] = {}
    if missing:
        with ray_session(config.ray_address, verbose=config.verbose):
            size = pool_size(config.num_workers, config.resources, len(missing))
            done = len(items) - len(missing)
            with Progress("generate", total=len(items), unit="pictures", initial=done) as progress:
                failures = paint_all(missing, spec, size, progress.advance)
    good = [item for item in items if item.file not in failures]
    _write_metadata(config, good, pipeline, output)
    if config.grid and good:
        _write_grid(config, good, output)
    counts = {
        "pictures": len(good),
        "made": len(missing) - len(failures),
        "reused": len(items) - len(missing),
        "failed": len(failures),
        "total": len(items),
    }
    failed = [{**describe(item), "reason": failures[item.file]} for item in items if item.file in failures]
    seconds = time.monotonic() - started
    write_report(output, counts=counts, seconds=round(seconds, 3), config=config, failures=failed)
    print(
        f"{counts['pictures']} pictures in {output} ({counts['made']} made, {counts['reused']} reused, "
        f"{counts['failed']} failed; {seconds:.1f} s); see {join(output, 'metadata.csv')}",
        flush=True,
    )
    if failed:
        first = failed[0]
        raise GenerateError(
            f"{len(failed)} of {len(items)} pictures failed, the first {first['prompt']!r} with seed {first['seed']}: "
            f"{first['reason']}; the same command tries them again"
        )
    return counts


def _identity(
    config: GenerateConfig, family: str, pipeline: type[BasePipeline], source: ModelSource, loras: Sequence[str]
) -> dict[str, Any]:
    """What decides the pixels beside the item: the weights, the LoRA files by content, and the number format."""
    for path in loras:
        if not exists(path):
            raise LoraError(f"LoRA file {path} does not exist; check --lora")
    return {
        "family": family,
        "dtype": config.dtype,
        "weights": {name: part_sketch(source, part.subfolder) for name, part in sorted(pipeline.parts.items())},
        "loras": [hashlib.blake2b(read_bytes(path), digest_size=16).hexdigest() for path in loras],
    }


def _write_metadata(config: GenerateConfig, items: Sequence[Item], pipeline: type[BasePipeline], output: str) -> None:
    rows = metadata_rows(config, items, pipeline)
    if not rows:
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes_atomic(join(output, "metadata.csv"), text.getvalue().encode("utf-8"))


def _write_grid(config: GenerateConfig, items: Sequence[Item], output: str) -> None:
    shown = items[:LIMIT]
    pictures = [_opened(join(output, item.file)) for item in shown]
    several = len(config.lora_scales) > 1
    labels = [f"{f'×{item.lora_scale:g} ' if several else ''}seed {item.seed} {item.prompt}" for item in shown]
    per_prompt = len(config.seed_list) or config.images_per_prompt
    columns = columns_of(len(shown), len(config.lora_scales), per_prompt)
    write_bytes_atomic(join(output, "grid.png"), png(draw_grid(pictures, labels, columns)))


def _opened(path: str) -> Image.Image:
    return load_first_frame(path) if path.endswith(".mp4") else load_image(path)
