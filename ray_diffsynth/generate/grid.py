"""Images on one sheet: a row for each prompt and seed, a column for each strength of the LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageFont

from ray_diffsynth.report.image_grid import ImageGrid

LIMIT = 64
"""Images on a sheet."""
_SIDE, _GAP, _LINE, _FONT = 256, 8, 18, 13


def columns_of(images: int, scales: int, per_prompt: int) -> int:
    """How many stand in a row: those of one seed at all strengths, else those of one prompt, else about a square."""
    if scales > 1:
        return scales
    return per_prompt if per_prompt > 1 else max(1, math.ceil(math.sqrt(images)))


def draw_grid(images: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """The images row by row under labels, scaled to one size that keeps their shape (small ones in whole steps)."""
    fitted = [_fitted(image) for image in images]
    font = ImageFont.load_default(_FONT)
    return ImageGrid.uniform(fitted, columns, gap=_GAP, heading=_LINE, labels=labels, font=font).image


def _fitted(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest < _SIDE:
        factor = _SIDE // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (round(image.width * _SIDE / longest), round(image.height * _SIDE / longest))
    return image.resize(size, Image.Resampling.LANCZOS)
