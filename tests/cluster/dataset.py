"""A dataset of few images in many sizes: a shard holds one size, so that there is something for several actors."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ray_diffsynth.demo.draw import draw_dataset


def draw_sizes(folder: Path, sizes: Sequence[tuple[int, int]], each: int) -> Path:
    """`each` images of every size (height, width), with a caption of its own each."""
    rows = [("image", "prompt")]
    for seed, (height, width) in enumerate(sizes):
        draw_dataset(folder / str(seed), each, seed=seed, height=height, width=width)
        for number, image in enumerate(sorted((folder / str(seed)).rglob("*.png"))):
            rows.append((str(image.relative_to(folder)), f"a shape of {height} by {width}, number {number}"))
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder
