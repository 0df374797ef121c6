"""What a run leaves beside its images: metadata.csv, grid.png, report.json, report.html and the last line."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.data.media import load_image
from ray_diffsynth.data.video import load_first_frame
from ray_diffsynth.generate.grid import LIMIT, columns_of, draw_grid
from ray_diffsynth.generate.items import Item, PipelineOrClass, family_defaults, item_facts, metadata_rows
from ray_diffsynth.generate.painter import png
from ray_diffsynth.report import PageImage, make_report, thumbnail, write_json, write_page
from ray_diffsynth.storage import file_size, join, write_bytes_atomic


@dataclass(frozen=True)
class Made:
    """What was to be made and what came of it.

    loras: their files. tried: how many of the items were not there before. failures: file -> reason. seconds: of
    generating alone, without loading the models.
    """

    family: str
    pipeline: PipelineOrClass
    loras: Sequence[str]
    items: Sequence[Item]
    tried: int
    failures: Mapping[str, str]
    seconds: float

    @property
    def good(self) -> list[Item]:
        return [item for item in self.items if item.file not in self.failures]


def write_results(config: GenerateConfig, made: Made, output: str, *, seconds: float) -> dict[str, int]:
    """Write all files beside the images, print the last line, and return the counts. `seconds`: of the whole run."""
    good, total = made.good, len(made.items)
    counts = {
        "pictures": len(good),
        "made": made.tried - len(made.failures),
        "reused": total - made.tried,
        "failed": len(made.failures),
        "total": total,
    }
    _write_metadata(config, good, made.pipeline, output)
    shown = good[:LIMIT]
    images = [_opened(join(output, item.file)) for item in shown]
    if config.grid and good:
        _write_grid(config, shown, images, output)
    report = make_report(
        counts=counts,
        seconds={"total": round(seconds, 3), "generating": round(made.seconds, 3)},
        config=config,
        pictures_per_second=round(counts["made"] / made.seconds, 4) if counts["made"] else None,
        settings={"family": made.family, **family_defaults(made.pipeline), **_asked(config)},
        loras=[_lora(path) for path in made.loras],
        lora_scales=list(config.lora_scales) if made.loras else [],
        shown=[item_facts(item) for item in shown],
        failures=[
            {**item_facts(item), "reason": made.failures[item.file]}
            for item in made.items
            if item.file in made.failures
        ],
    )
    write_json(output, report)
    write_page(output, report, images=report_images(shown, images, several=len(config.lora_scales) > 1))
    print(
        f"{counts['pictures']} images in {output} ({counts['made']} made, {counts['reused']} reused, "
        f"{counts['failed']} failed; {seconds:.1f} s); see {join(output, 'report.html')}",
        flush=True,
    )
    return counts


def report_images(items: Sequence[Item], images: Sequence[Image.Image], *, several: bool) -> list[PageImage]:
    """The images of the page; with `several` strengths of the LoRA those of one prompt and seed stand together."""
    found = []
    for item, image in zip(items, images, strict=True):
        strength = f"strength {item.lora_scale:g}" if item.lora_scale else "without the LoRA"
        made_from = f"{item.prompt}, seed {item.seed}"
        if several:
            found.append(PageImage(thumbnail(image), strength, f"{made_from}, {strength}", group=made_from))
        else:
            # The seed first: of a long prompt only the start is shown.
            found.append(PageImage(thumbnail(image), f"seed {item.seed}: {item.prompt}", made_from))
    return found


def _asked(config: GenerateConfig) -> dict[str, Any]:
    asked = {"num_inference_steps": config.num_inference_steps, "cfg_scale": config.cfg_scale}
    return {name: value for name, value in asked.items() if value is not None}


def _lora(path: str) -> dict[str, Any]:
    folder, _, file = path.rpartition("/")
    return {"folder": folder, "file": file, "bytes": file_size(path)}


def _write_metadata(config: GenerateConfig, items: Sequence[Item], pipeline: PipelineOrClass, output: str) -> None:
    rows = metadata_rows(config, items, pipeline)
    if not rows:
        return
    text = io.StringIO(newline="")
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes_atomic(join(output, "metadata.csv"), text.getvalue().encode("utf-8"))


def _write_grid(config: GenerateConfig, items: Sequence[Item], images: Sequence[Image.Image], output: str) -> None:
    several = len(config.lora_scales) > 1
    labels = [f"{f'×{item.lora_scale:g} ' if several else ''}seed {item.seed} {item.prompt}" for item in items]
    per_prompt = len(config.seed_list) or config.images_per_prompt
    columns = columns_of(len(items), len(config.lora_scales), per_prompt)
    write_bytes_atomic(join(output, "grid.png"), png(draw_grid(images, labels, columns)))


def _opened(path: str) -> Image.Image:
    return load_first_frame(path) if path.endswith(".mp4") else load_image(path)
