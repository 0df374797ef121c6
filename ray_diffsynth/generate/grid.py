"""Pictures on one sheet: a row for each prompt and seed, a column for each strength of the LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LIMIT = 64
"""Pictures on a sheet."""
_SIDE, _GAP, _LINE, _FONT = 256, 8, 18, 13


def columns_of(pictures: int, scales: int, per_prompt: int) -> int:
    """How many stand in a row: those of one seed at all strengths, else those of one prompt, else about a square."""
    if scales > 1:
        return scales
    return per_prompt if per_prompt > 1 else max(1, math.ceil(math.sqrt(pictures)))


def draw_grid(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """The pictures row by row under labels, scaled to one size that keeps their shape (small ones in whole steps)."""
    cell_width, cell_height = (max(side) for side in zip(*(_fitted(p).size for p in pictures), strict=True))
    rows = -(-len(pictures) // columns)
    step_x, step_y = cell_width + _GAP, cell_height + _LINE + _GAP
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = _GAP + index % columns * step_x, _GAP + index // columns * step_y
        draw.text((x, y), _cut(label, draw, font, cell_width), fill="black", font=font)
        sheet.paste(_fitted(picture), (x, y + _LINE))
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    longest = max(picture.size)
    if longest < _SIDE:
        factor = _SIDE // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = (round(picture.width * _SIDE / longest), round(picture.height * _SIDE / longest))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _cut(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text in one line, its end left out where it does not fit."""
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(f"{text}…", font=font) > width:
        text = text[:-1]
    return f"{text}…"
