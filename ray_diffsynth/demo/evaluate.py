"""The judge of the demo: does an image show what its prompt says? Rendering statistics only, no learnt model.

`python -m ray_diffsynth.demo.evaluate [MODEL]` draws 100 known prompts with the model and prints the figures.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import QwenImagePipeline
from PIL import Image

from ray_diffsynth.demo.captions import COLORS, SHAPES, SIZES, Scene, canonical
from ray_diffsynth.demo.draw import BODY, HORN, Pixels, draw_scene, random_scene
from ray_diffsynth.report.image_grid import ImageGrid

Mask = npt.NDArray[np.bool_]
PATCH = 32  # side of the normalised silhouettes
MIN_OVERLAP = 0.7  # intersection over union below which a silhouette is no shape at all
STEPS, GUIDANCE = 16, 2.0


@dataclass(frozen=True)
class Verdict:
    """What an image shows: the names of the nearest colours, of the best matching shape, and how well it matches."""

    background: str
    color: str
    shape: str
    overlap: float

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Which of background, color and shape are as in the scene."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ("background", "color", "shape")}


def _nearest(pixels: npt.NDArray[np.float64]) -> str:
    """The palette's name for the median of (n, 3) pixels."""
    distance = np.linalg.norm(np.array(list(COLORS.values())) - np.median(pixels, axis=0), axis=1)
    return list(COLORS)[int(distance.argmin())]


def _border(pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The pixels of the four corners, a sixteenth of the image each way: (n, 3)."""
    k = max(1, pixels.shape[0] // 16)
    ends = np.r_[:k, -k:0]
    return np.asarray(pixels[np.ix_(ends, ends)].reshape(-1, 3))


def _silhouette(mask: Mask) -> Mask:
    """The mask cut to its bounding box and scaled to PATCH × PATCH."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scaled = Image.fromarray(cut.astype(np.uint8) * 255).resize((PATCH, PATCH), Image.Resampling.BILINEAR)
    return np.asarray(scaled) > 127


def _foreground(pixels: npt.NDArray[np.float64]) -> Mask:
    """Pixels nearer to the commonest other colour than to the background; thin specks are left out."""
    ground = np.median(_border(pixels), axis=0)
    mask: Mask = np.linalg.norm(pixels - ground, axis=-1) > 50
    if not mask.any():
        return mask
    ink = np.median(pixels[mask], axis=0)
    mask = np.linalg.norm(pixels - ink, axis=-1) < np.linalg.norm(pixels - ground, axis=-1)
    padded = np.pad(mask, 1).astype(int)
    around = np.stack([np.roll(padded, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    return np.asarray(mask & (around.sum(0)[1:-1, 1:-1] >= 5))


@functools.cache
def _templates() -> dict[str, Mask]:
    rng = np.random.default_rng(0)
    scenes = {shape: Scene(shape, "white", "black", "large", 0.7, 0.0, 0.0) for shape in SHAPES}
    return {shape: _silhouette(draw_scene(scene, rng)[..., 0] > 128) for shape, scene in scenes.items()}


def judge(pixels: Pixels) -> Verdict:
    """Judge an image (H, W, 3) uint8 of a plain shape. Without a foreground, color and shape are 'nothing'."""
    values = pixels.astype(np.float64)
    background, mask = _nearest(_border(values)), _foreground(values)
    if mask.sum() < 0.02 * mask.size:
        return Verdict(background, "nothing", "nothing", 0.0)
    shown = _silhouette(mask)
    overlaps = {name: float((shown & t).sum() / (shown | t).sum()) for name, t in _templates().items()}
    best = max(overlaps, key=lambda name: overlaps[name])
    shape = best if overlaps[best] >= MIN_OVERLAP else "nothing"
    return Verdict(background, _nearest(values[mask]), shape, round(overlaps[best], 3))


def is_creature(pixels: Pixels) -> bool:
    """Whether the image shows a zorp: a turquoise body, a pink horn on either side, a white eye with a pupil."""
    values = pixels.astype(np.float64)
    body = np.linalg.norm(values - BODY, axis=-1) < 60
    if body.sum() < 0.08 * body.size:
        return False
    rows, columns = np.flatnonzero(body.sum(1) >= 3), np.flatnonzero(body.sum(0) >= 3)
    if len(rows) < 8 or len(columns) < 8:
        return False
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width, middle = bottom - top, right - left, (left + right) // 2
    horn = np.linalg.norm(values - HORN, axis=-1) < 70
    crown = horn[max(0, top - height // 3) : top + height // 2]
    eye = values[top + height // 10 : top + height * 3 // 5, middle - width // 4 : middle + width // 4].mean(-1)
    horns = min(crown[:, :middle].sum(), crown[:, middle:].sum()) >= 0.004 * body.size
    return bool(horns and (eye > 200).mean() > 0.15 and (eye < 90).mean() > 0.05)


def known_scenes(n: int = 100, seed: int = 1_000) -> list[Scene]:
    """`n` scenes in which every shape, size and colour comes up equally often (as far as n allows)."""
    rng = np.random.default_rng(seed)
    shapes, sizes, colors = SHAPES, list(SIZES), list(COLORS)
    scenes = [random_scene(rng) for _ in range(n)]
    out = []
    for i, scene in enumerate(scenes):
        color = colors[(i + i // len(shapes)) % len(colors)]
        background = scene.background if scene.background != color else colors[(colors.index(color) + 3) % len(colors)]
        out.append(Scene(shapes[i % len(shapes)], color, background, sizes[i % len(sizes)], 0.6, 0.0, 0.0))
    return out


@torch.no_grad()
def sample(
    pipe: QwenImagePipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 25,
) -> list[Pixels]:
    """64×64 images of the prompts; image i starts from the noise of seed + i, whatever the batch size."""
    pipe.set_progress_bar_config(disable=True)
    out: list[Pixels] = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        images = pipe(
            prompt=some,
            negative_prompt=[" "] * len(some),
            true_cfg_scale=guidance,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(some))],
            height=64,
            width=64,
            output_type="np",
        ).images
        out += [(image * 255).round().astype(np.uint8) for image in images]
    return out


def grid(images: Sequence[Pixels], columns: int, scale: int = 2, gap: int = 2) -> Image.Image:
    """The images in rows of `columns`, enlarged `scale` times, on white."""
    sheet = ImageGrid.uniform([Image.fromarray(image) for image in images], columns, gap=gap).image
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Score:
    """Shares of `n` images with the right background, colour and shape, and with all three; mean overlap."""

    n: int
    background: float
    color: float
    shape: float
    all: float
    overlap: float


def score(images: Sequence[Pixels], scenes: Sequence[Scene]) -> Score:
    """Judge images of known scenes."""
    verdicts = [judge(image) for image in images]
    right = [verdict.agrees(scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
    share = {name: float(np.mean([r[name] for r in right])) for name in ("background", "color", "shape")}
    together = float(np.mean([all(r.values()) for r in right]))
    return Score(n=len(right), **share, all=together, overlap=round(float(np.mean([v.overlap for v in verdicts])), 3))


def main() -> None:
    """Print the score of a model on 100 known prompts, and save their grid if asked."""
    from ray_diffsynth.demo import demo_model_path

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=demo_model_path())
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--grid", type=Path)
    args = parser.parse_args()
    pipe = QwenImagePipeline.from_pretrained(args.model, dtype=torch.float32)
    scenes = known_scenes(args.n)
    clock = time.perf_counter()
    images = sample(pipe, [canonical(scene) for scene in scenes], steps=args.steps, guidance=args.guidance)
    seconds = time.perf_counter() - clock
    print(json.dumps(asdict(score(images, scenes)) | {"seconds": round(seconds, 1)}))
    if args.grid:
        grid(images, 10).save(args.grid)


if __name__ == "__main__":
    main()
