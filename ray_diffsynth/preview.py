"""A contact sheet of a cache: a few samples decoded from their latents, beside their captions."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageFont

from ray_diffsynth import storage
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.models.locate import locate_model
from ray_diffsynth.pipelines.registry import FAMILIES, get_pipeline_class
from ray_diffsynth.report.image_grid import ImageGrid

LATENTS = "input_latents"
_TEXT_WIDTH, _GAP, _FONT_SIZE = 360, 8, 13


def write_preview(cache: str, model: str, output: str, *, samples: int = 8, family: str | None = None) -> list[str]:
    """Decode `samples` spread evenly over the cache and write the sheet as PNG; returns their ids.

    `family`: your own module. The cache's word imports none: it may come from anywhere.

    Raises CacheError for a cache without latents, or of a family that only `family` may name; and what locating and
    loading the VAE of `model` raise.
    """
    reader = CacheReader(cache)
    if family is None and reader.manifest.family not in FAMILIES:
        raise CacheError(
            f"{cache} is of the family {reader.manifest.family!r}, which is none of ray_diffsynth's; no module is "
            "imported because a cache names it: if it is your own, give it as --family"
        )
    if LATENTS not in reader.manifest.parameters:
        held = ", ".join(reader.manifest.parameters)
        raise CacheError(f"{cache} holds no {LATENTS} to decode, only {held}")
    count = min(samples, len(reader))
    rows = [at * len(reader) // count for at in range(count)]
    captions = reader.manifest.read_captions(reader.cache)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: torch.dtype = getattr(torch, reader.manifest.dtype)
    pipeline = get_pipeline_class(family or reader.manifest.family)
    source = locate_model(model, wanted=[part.subfolder for name, part in pipeline.parts.items() if name == "vae"])
    pipe = pipeline.from_pretrained(source, models=["vae"], device=device, torch_dtype=dtype)
    decode: Any = pipe.decode_latents  # each family has its own
    entries = []
    for row in rows:
        latents = reader.read([row])[0][LATENTS]
        with torch.no_grad():
            pixels = decode(latents.to(device, dtype), tiled=False, tile_size=128, tile_stride=64)
        frame = pixels if pixels.ndim == 4 else pixels[:, :, pixels.shape[2] // 2]  # of a video the middle frame
        entries.append((pipe.vae_output_to_image(frame), reader.sample_ids[row], captions[row] or ""))
    data = io.BytesIO()
    contact_sheet(entries).save(data, format="PNG")
    storage.write_bytes_atomic(output, data.getvalue())
    return [sample_id for _, sample_id, _ in entries]


def contact_sheet(entries: Sequence[tuple[Image.Image, str, str]], side: int = 256) -> Image.Image:
    """One line an entry (image, sample id, caption): the image, `side` pixels at most, and its texts beside it."""
    font = ImageFont.load_default(_FONT_SIZE)
    cells = []
    for image, sample_id, caption in entries:
        scale = side / max(image.size)
        shown = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        lines = [sample_id, "", *textwrap.wrap(caption or "(no caption)", 52)]
        cells.append((shown, "\n".join(lines), max(shown.height, (_FONT_SIZE + 5) * len(lines))))
    grid = ImageGrid([side, _TEXT_WIDTH], [height for _, _, height in cells], gap=_GAP)
    for row, (shown, text, _) in enumerate(cells):
        grid.paste(2 * row, shown)
        grid.write(2 * row + 1, text, font)
    return grid.image
