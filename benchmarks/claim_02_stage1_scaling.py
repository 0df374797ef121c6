"""Claim 2: stage 1 with two actors against one, with an encoder that sleeps and with one that computes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, in_turn, main
from benchmarks.stage1 import draw, fresh, local_ray, preprocess, steady_rate

TIMES = 5


def measure() -> list[Row]:
    from ray_diffsynth.demo.tiny import build_tiny_model
    from tests.preprocess.counting import FAMILY, build_model

    root = Path(tempfile.mkdtemp(prefix="claim-02-"))
    data = draw(root / "data", 64 * 14, 64, captions=4)
    sleeper, real = build_model(root / "sleeper", sleep=0.01), build_tiny_model(root / "real")
    larger = draw(root / "larger", 64 * 7, 192, captions=4)

    def rate(workers: int, model: Path, images: Path, **options: Any) -> float:
        cache = root / f"cache-{model.name}"
        fresh(cache / "vae")  # the captions stay: their actors' start is no part of the rate
        preprocess(model, images, cache, num_workers=workers, batch_size=4, **options)
        return steady_rate(cache, "vae", workers)

    rows = []
    cores = len(os.sched_getaffinity(0))
    # What sleeps needs no core: on this Ray both actors have room beside the decoding.
    with local_ray(cpus=8):
        found = in_turn(
            lambda: rate(1, sleeper, data, family=FAMILY), lambda: rate(2, sleeper, data, family=FAMILY), TIMES
        )
        rows.append(Row("2", "stage-1 scaling 1 -> 2 actors, sleeping encoder", found["ratio"], ">=", 1.95, found))
    with local_ray(cpus=cores):
        found = in_turn(
            lambda: rate(1, real, larger, dtype="float32"), lambda: rate(2, real, larger, dtype="float32"), TIMES
        )
        what = f"the same, real encoder on {cores} cores"
        rows.append(Row("2", what, found["ratio"], ">=", 1.7, found))
    return rows


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
