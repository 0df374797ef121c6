"""Random images for the VAE: blobs, monsters and glows, so that it can also show what no caption names.

The creature is not among them on purpose, but `cyclops` has its build and random colours, which in one or two of a
thousand images come near the creature's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from ray_diffsynth.demo.draw import OUTLINES, Canvas, Color, Pixels, draw_scene, random_scene

SIDE = 64


def _color(rng: np.random.Generator) -> Color:
    r, g, b = (int(v) for v in rng.integers(0, 256, 3))
    return r, g, b


def _ground(rng: np.random.Generator) -> Canvas:
    """A plain ground or, three times in ten, a linear gradient."""
    canvas = Canvas(SIDE, SIDE, _color(rng))
    if rng.random() < 0.3:
        ends = np.array([_color(rng), _color(rng)], dtype=np.float64)
        ramp = np.linspace(0, 1, canvas.image.height)[:, None, None]
        plane = np.broadcast_to(ends[0] * (1 - ramp) + ends[1] * ramp, (canvas.image.height, canvas.image.width, 3))
        turned = plane.transpose(1, 0, 2) if rng.random() < 0.5 else plane
        canvas.image.paste(Image.fromarray(np.ascontiguousarray(turned).astype(np.uint8)))
    return canvas


def _eye(canvas: Canvas, rng: np.random.Generator, x: float, y: float, r: float) -> None:
    white = _color(rng) if rng.random() < 0.5 else (250, 250, 250)
    canvas.ellipse(x, y, r, r, white)
    down = float(rng.uniform(-0.2, 0.2))
    pupil = _color(rng) if rng.random() < 0.5 else (25, 25, 30)
    canvas.ellipse(x, y + down * r, 0.5 * r, 0.5 * r, pupil)


def _outline(rng: np.random.Generator, x: float, y: float, r: float) -> list[tuple[float, float]]:
    return OUTLINES[str(rng.choice(list(OUTLINES)))](x, y, r)


def clutter(rng: np.random.Generator) -> Pixels:
    """A ground with two to eight overlapping blobs, polygons, eyes, lines and outlines of any colour and size."""
    canvas = _ground(rng)
    for _ in range(rng.integers(2, 9)):
        x, y = (float(v) for v in rng.uniform(-1, 1, 2))
        r = float(np.exp(rng.uniform(np.log(0.06), np.log(0.8))))
        match int(rng.integers(0, 5)):
            case 0:
                canvas.ellipse(x, y, r, r * float(rng.uniform(0.4, 1)), _color(rng))
            case 1:
                canvas.polygon(_outline(rng, x, y, r), _color(rng))
            case 2:
                _eye(canvas, rng, x, y, max(r / 2, 0.12))
            case 3:
                end = (float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1)))
                canvas.line([(x, y), end], _color(rng), float(rng.uniform(0.05, 0.16)))
            case _:
                points = _outline(rng, x, y, r)
                canvas.line(points + points[:2], _color(rng), float(rng.uniform(0.05, 0.16)))
    return canvas.pixels()


def glow(rng: np.random.Generator) -> Pixels:
    """Lit tubes in a dark room: outlines of any colour with a blurred halo."""
    ground = np.array(_color(rng)) * rng.uniform(0.05, 0.4)
    halo, tube = Canvas(SIDE, SIDE, (0, 0, 0)), Canvas(SIDE, SIDE, (0, 0, 0))
    for _ in range(rng.integers(1, 4)):
        x, y = (float(v) for v in rng.uniform(-0.4, 0.4, 2))
        points = _outline(rng, x, y, float(rng.uniform(0.2, 0.8)))
        color, closed = _color(rng), points + points[:2]
        light = (min(255, color[0] // 2 + 128), min(255, color[1] // 2 + 128), min(255, color[2] // 2 + 128))
        halo.line(closed, color, float(rng.uniform(0.1, 0.3)))
        tube.line(closed, color, 0.14)
        tube.line(closed, light, float(rng.uniform(0.05, 0.09)))
    blurred = np.asarray(Image.fromarray(halo.pixels()).filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 4)))))
    return np.clip(np.maximum(ground + 0.9 * blurred, tube.pixels()), 0, 255).astype(np.uint8)


def monster(rng: np.random.Generator) -> Pixels:
    """A body with feet, horns, eyes and a mouth, all of random colours, places and proportions."""
    canvas, body, limb = _ground(rng), _color(rng), _color(rng)
    x, y = (float(v) for v in rng.uniform(-0.2, 0.2, 2))
    r, flat = float(rng.uniform(0.35, 0.7)), float(rng.uniform(0.7, 1.1))
    spread, width, tall = (float(v) for v in rng.uniform(0.2, 0.7, 3))
    for side in (-1, 1):
        canvas.ellipse(x + side * spread * r, y + 0.95 * flat * r, 0.5 * width * r, 0.35 * tall * r, limb)
    for side in (-1, 1):
        root, tip = spread * r, (x + side * (spread + 0.3 * width) * r, y - (0.9 * flat + tall) * r)
        canvas.polygon(
            [(x + side * (root - 0.3 * r), y - 0.5 * r), tip, (x + side * (root + 0.3 * r), y - 0.4 * r)], limb
        )
    canvas.ellipse(x, y, r, flat * r, body)
    eyes = int(rng.integers(1, 4))
    for i in range(eyes):
        _eye(
            canvas,
            rng,
            x + (i - (eyes - 1) / 2) * 0.7 * r,
            y - float(rng.uniform(0, 0.4)) * r,
            float(rng.uniform(0.25, 0.5)) * r,
        )
    canvas.ellipse(x, y + 0.55 * r, float(rng.uniform(0.15, 0.6)) * r, float(rng.uniform(0.08, 0.25)) * r, _color(rng))
    return canvas.pixels()


def cyclops(rng: np.random.Generator) -> Pixels:
    """A monster of the creature's build: round, two horns, one big eye, a wide mouth; its colours are random.

    Every measure is the creature's, off by at most a share that is drawn for the whole image.
    """
    canvas, body, limb, horn = _ground(rng), _color(rng), _color(rng), _color(rng)
    x, y = (float(v) for v in rng.uniform(-0.08, 0.08, 2))
    r, off = float(rng.uniform(0.5, 0.72)), float(rng.uniform(0, 0.15))

    def near(measure: float) -> float:
        return measure * r * float(rng.uniform(1 - off, 1 + off))

    foot = near(0.45), near(0.95), near(0.34), near(0.24)
    inner, tip, outer = (near(0.25), near(0.7)), (near(0.95), near(1.2)), (near(0.85), near(0.35))
    for side in (-1, 1):
        canvas.ellipse(x + side * foot[0], y + foot[1], foot[2], foot[3], limb)
        canvas.polygon([(x + side * across, y - up) for across, up in (inner, tip, outer)], horn)
    canvas.ellipse(x, y, r, near(0.95), body)
    eye, up, pupil = near(0.48), near(0.22), near(0.24)
    dark = _color(rng) if rng.random() < 0.5 else (25, 25, 30)
    canvas.ellipse(x, y - up, eye, eye, _color(rng) if rng.random() < 0.5 else (250, 250, 250))
    canvas.ellipse(x, y - up + near(0.04), pupil, pupil, dark)
    canvas.ellipse(x, y + near(0.55), near(0.45), near(0.15), dark if rng.random() < 0.5 else _color(rng))
    return canvas.pixels()


Kinds = tuple[tuple[float, Callable[[np.random.Generator], Pixels]], ...]
ENCODER_KINDS: Kinds = ((0.25, clutter), (0.5, monster), (0.7, glow))
DECODER_KINDS: Kinds = ((0.1, clutter), (0.2, monster), (0.6, cyclops), (0.8, glow))
"""Kinds of images, each with the share of images that it and those before it have; the rest are plain shapes."""


def encoder_image(seed: int, index: int) -> Pixels:
    """Image `index` that the encoder is fitted to: clutter, monsters and glows, and three in ten plain shapes."""
    return _one_of(ENCODER_KINDS, np.random.default_rng([seed, index, 1]))


def decoder_image(seed: int, index: int) -> Pixels:
    """Image `index` that the decoder is trained on: the encoder's kinds, and two in five monsters with one eye."""
    return _one_of(DECODER_KINDS, np.random.default_rng([seed, index, 3]))


def _one_of(kinds: Kinds, rng: np.random.Generator) -> Pixels:
    share = rng.random()
    draw = next((draw for up_to, draw in kinds if share < up_to), None)
    return draw_scene(random_scene(rng, spread=0.25), rng) if draw is None else draw(rng)


def kept_images(path: Path, draw: Callable[[int, int], Pixels], seed: int, count: int) -> Pixels:
    """The first `count` images that `draw` gives for the seed (count, 64, 64, 3), drawn once and kept in `path`."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.stack([draw(seed, i) for i in range(count)]), allow_pickle=False)
    return np.asarray(np.load(path, allow_pickle=False))
