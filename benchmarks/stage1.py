"""Stage 1 for the benchmarks: data, runs on a Ray of this process, and the rate without start-up."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image


@contextmanager
def local_ray(cpus: int = 2) -> Iterator[None]:
    """A Ray of `cpus` CPUs without a dashboard, one thread a worker."""
    import ray
    import ray.data  # sets up its logger when it is imported

    from ray_diffsynth.cluster.session import LOGGERS

    os.environ["OMP_NUM_THREADS"] = "1"
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=ray.util.annotations.RayDeprecationWarning)
    try:
        yield
    finally:
        ray.shutdown()


def draw(folder: Path, count: int, side: int, captions: int | None = None, suffix: str = "png", first: int = 0) -> Path:
    """`count` different images of side x side (smooth colours, some noise) and a metadata.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    ramp = np.linspace(0, 1, side)[:, None, None] * np.linspace(0, 1, side)[None, :, None]
    for number in range(first, first + count):
        random = np.random.default_rng(number)
        pixels = ramp * random.integers(60, 200, 3) + random.integers(0, 50, (side, side, 1))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:05d}.{suffix}")
        rows.append((f"{number:05d}.{suffix}", f"caption {number % (captions or count + first)}"))
    table = folder / "metadata.csv"
    new = not table.exists()
    with open(table, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*([("image", "prompt")] if new else []), *rows])
    return folder


def preprocess(model: Path, data: Path, cache: Path, **options: Any) -> dict[str, Any]:
    """Stage 1 in this process."""
    from ray_diffsynth.config import PreprocessConfig
    from ray_diffsynth.preprocess.job import run

    return run(PreprocessConfig(model=str(model), dataset_base_path=str(data), output_path=str(cache), **options))


def steady_rate(cache: Path, group: str, workers: int = 1) -> float:
    """Rows a second of a run without its start-up and its end.

    Files carry the time when they were written. The rows but those of each actor's first file, over the time from the
    mean of the actors' first files to the mean of their last ones: the same whether they keep step or alternate.
    """
    import pyarrow.parquet as pq

    files = sorted(
        (path.stat().st_mtime, pq.read_metadata(path).num_rows) for path in (cache / group).glob("*.parquet")
    )
    if len(files) < 2 * workers + 1:
        raise ValueError(f"{len(files)} files are too few to tell the rate of {workers} actors")
    start, end = (mean(time for time, _ in part) for part in (files[:workers], files[-workers:]))
    return sum(rows for _, rows in files[workers:]) / (end - start)


def fresh(folder: Path) -> Path:
    """The folder, absent."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
