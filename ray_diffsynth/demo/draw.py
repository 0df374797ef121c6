"""Procedural images with captions: one coloured shape on a plain background, a creature and a style held out.

Every image is a function of (seed, index). Coordinates are in units of half the image's shorter side, with the
origin in the centre and y downwards, so that the same scene can be drawn at any size.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from ray_diffsynth.demo.captions import COLORS, CREATURE, SHAPES, SIZES, STYLE, Scene, caption

Pixels = npt.NDArray[np.uint8]  # (height, width, 3)
Color = tuple[int, int, int]
Point = tuple[float, float]
Kind = Literal["shapes", "creature", "style"]

SUPERSAMPLING = 4
BODY, DARK, HORN, EYE, PUPIL = (70, 200, 170), (35, 120, 105), (245, 120, 185), (250, 250, 250), (25, 25, 30)


@dataclass(frozen=True)
class DrawnImage:
    """A drawn image: `pixels` (height, width, 3) uint8, its prompt, and the scene that both come from."""

    pixels: Pixels
    prompt: str
    scene: Scene


class Canvas:
    """A supersampled image with coordinates in units of half its shorter side, origin in the centre."""

    def __init__(self, height: int, width: int, color: Color) -> None:
        self.height, self.width = height, width
        self.image = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), color)
        self.draw = ImageDraw.Draw(self.image)
        self.unit = min(height, width) * SUPERSAMPLING / 2

    def point(self, x: float, y: float) -> Point:
        return self.image.width / 2 + x * self.unit, self.image.height / 2 + y * self.unit

    def polygon(self, points: list[Point], color: Color) -> None:
        self.draw.polygon([self.point(*p) for p in points], fill=color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        self.draw.ellipse([self.point(x - rx, y - ry), self.point(x + rx, y + ry)], fill=color)

    def line(self, points: list[Point], color: Color, width: float) -> None:
        self.draw.line([self.point(*p) for p in points], fill=color, width=round(width * self.unit), joint="curve")

    def pixels(self) -> Pixels:
        return np.asarray(self.image.resize((self.width, self.height), Image.Resampling.BOX))


def _radial(x: float, y: float, radii: list[float], start: float = -90.0) -> list[Point]:
    """The polygon whose corners lie at equal angles from `start` degrees, at the given distances from (x, y)."""
    angles = [math.radians(start + 360 * i / len(radii)) for i in range(len(radii))]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart(x: float, y: float, r: float) -> list[Point]:
    points = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x + r * math.sin(t) ** 3, y - r * (up + 2) / 16))
    return points


def _cross(x: float, y: float, r: float) -> list[Point]:
    a, b = 0.33 * r, 0.95 * r
    arm = [(-a, -b), (a, -b), (a, -a)]  # the upper arm, then turned by a quarter three times
    corners = arm + [(-dy, dx) for dx, dy in arm] + [(-dx, -dy) for dx, dy in arm] + [(dy, -dx) for dx, dy in arm]
    return [(x + dx, y + dy) for dx, dy in corners]


OUTLINES: dict[str, Callable[[float, float, float], list[Point]]] = {
    "circle": lambda x, y, r: _radial(x, y, [0.95 * r] * 60),
    "ring": lambda x, y, r: _radial(x, y, [r] * 60),
    "square": lambda x, y, r: _radial(x, y, [1.17 * r] * 4, start=45.0),
    "diamond": lambda x, y, r: _radial(x, y, [1.1 * r, 0.72 * r] * 2),
    "triangle": lambda x, y, r: _radial(x, y + 0.18 * r, [1.18 * r] * 3),
    "star": lambda x, y, r: _radial(x, y + 0.05 * r, [1.15 * r, 0.5 * r] * 5),
    "heart": _heart,
    "cross": _cross,
}
HOLE = 0.55  # inner radius of the ring


def jitter(rng: np.random.Generator, color: Color, amount: int = 8) -> Color:
    """The colour with every channel moved by at most `amount`."""
    r, g, b = (int(np.clip(v + rng.integers(-amount, amount + 1), 0, 255)) for v in color)
    return r, g, b


def _draw_shape(canvas: Canvas, scene: Scene, color: Color, background: Color) -> None:
    canvas.polygon(OUTLINES[scene.shape](scene.x, scene.y, scene.radius), color)
    if scene.shape == "ring":
        canvas.polygon(OUTLINES["ring"](scene.x, scene.y, HOLE * scene.radius), background)


def _draw_creature(canvas: Canvas, scene: Scene) -> None:
    """A zorp: a round turquoise body on two feet, two pink horns, one big eye, a wide mouth."""
    x, y, r = scene.x, scene.y, scene.radius
    for side in (-1, 1):
        canvas.ellipse(x + side * 0.45 * r, y + 0.95 * r, 0.34 * r, 0.24 * r, DARK)
        tip = (x + side * 0.95 * r, y - 1.2 * r)
        canvas.polygon([(x + side * 0.25 * r, y - 0.7 * r), tip, (x + side * 0.85 * r, y - 0.35 * r)], HORN)
    canvas.ellipse(x, y, r, 0.95 * r, BODY)
    canvas.ellipse(x, y - 0.22 * r, 0.48 * r, 0.48 * r, EYE)
    canvas.ellipse(x, y - 0.18 * r, 0.24 * r, 0.24 * r, PUPIL)
    canvas.ellipse(x, y + 0.55 * r, 0.45 * r, 0.15 * r, PUPIL)


def _draw_neon(scene: Scene, color: Color, background: Color, height: int, width: int) -> Pixels:
    """The shape as a glowing tube in its colour, before a night version of the background."""
    night = tuple(int(0.25 * v + 0.75 * n) for v, n in zip(background, (12, 10, 30), strict=True))
    lit = (95, 95, 115) if color == COLORS["black"] else color
    core = tuple(min(255, int(0.4 * v + 153)) for v in lit)
    glow, tube = Canvas(height, width, (0, 0, 0)), Canvas(height, width, (0, 0, 0))
    scale = [1.0, HOLE] if scene.shape == "ring" else [1.0]
    for points in (OUTLINES[scene.shape](scene.x, scene.y, k * scene.radius) for k in scale):
        closed = points + points[:2]
        glow.line(closed, lit, 0.22)
        tube.line(closed, lit, 0.14)
        tube.line(closed, (core[0], core[1], core[2]), 0.06)
    blur = ImageFilter.GaussianBlur(0.1 * min(height, width) / 2)
    halo = np.asarray(Image.fromarray(glow.pixels()).filter(blur), dtype=np.float64)
    light = np.maximum(np.array(night) + 0.9 * halo, tube.pixels())
    return np.clip(light, 0, 255).astype(np.uint8)


def draw_scene(scene: Scene, rng: np.random.Generator, height: int = 64, width: int = 64) -> Pixels:
    """Draw a scene as (height, width, 3) uint8. `rng` moves the colours a little."""
    background, color = jitter(rng, COLORS[scene.background]), jitter(rng, COLORS[scene.color])
    if scene.style == STYLE:
        return _draw_neon(scene, COLORS[scene.color], background, height, width)
    canvas = Canvas(height, width, background)
    if scene.shape == CREATURE:
        _draw_creature(canvas, scene)
    else:
        _draw_shape(canvas, scene, color, background)
    return canvas.pixels()


def random_scene(rng: np.random.Generator, kind: Kind = "shapes", spread: float = 0.03) -> Scene:
    """A scene of the given kind, its centre at most `spread` from the image's centre in x and y."""
    color, background = (str(c) for c in rng.choice(list(COLORS), 2, replace=False))
    size, shape = str(rng.choice(list(SIZES))), str(rng.choice(SHAPES))
    radius = float(rng.uniform(*SIZES[size]))
    if kind == "creature":
        shape, radius = CREATURE, float(rng.uniform(0.60, 0.66))
    x, y = (float(v) for v in rng.uniform(-spread, spread, 2))
    return Scene(shape, color, background, size, radius, x, y, STYLE if kind == "style" else "")


def draw_image(
    seed: int, index: int, *, kind: Kind = "shapes", varied: bool = True, height: int = 64, width: int = 64
) -> DrawnImage:
    """Image number `index` of the endless sequence that `seed` names.

    `varied` prompts use the whole grammar (filler words, words left out); otherwise the prompt is the canonical one.
    """
    rng = np.random.default_rng([seed, index])
    scene = random_scene(rng, kind)
    return DrawnImage(draw_scene(scene, rng, height, width), caption(scene, rng if varied else None), scene)


def draw_dataset(
    folder: str | Path,
    n: int,
    seed: int = 0,
    *,
    kind: Kind = "shapes",
    varied: bool = False,
    height: int = 64,
    width: int = 64,
) -> Path:
    """Write `n` images as PNG and a metadata.csv with the columns image (relative path) and prompt.

    Returns the path of metadata.csv. The same arguments write the same bytes.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    table = root / "metadata.csv"
    with table.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "prompt"])
        for index in range(n):
            image = draw_image(seed, index, kind=kind, varied=varied, height=height, width=width)
            name = f"{kind}_{index:05d}.png"
            Image.fromarray(image.pixels).save(root / name)
            writer.writerow([name, image.prompt])
    return table
