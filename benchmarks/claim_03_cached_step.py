"""Claim 3: a step of stage 2 that reads the cache against the same step on samples that are in memory: mean and p99."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.caches import gaussian_cache
from benchmarks.harness import Row, in_turn, main
from benchmarks.stage1 import fresh
from benchmarks.stage2 import SIDE, config, model, step_seconds

SAMPLES, TIMES = 96, 9


def measure() -> list[Row]:
    import torch

    from ray_diffsynth.training.context import LocalContext
    from ray_diffsynth.training.loop import train
    from ray_diffsynth.training.setup import Setup

    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="claim-03-"))
    folder = model(root / "model")
    gaussian_cache(root / "cache", SAMPLES, side=SIDE)
    opened = Setup.open_data
    p99: dict[str, list[float]] = {"memory": [], "cache": []}

    def in_memory(setup: Setup) -> Any:
        source = opened(setup)
        samples = source.fetch(range(SAMPLES))
        source.fetch = lambda rows: [dict(samples[row]) for row in rows]  # type: ignore[method-assign]
        return source

    def run(name: str) -> float:
        Setup.open_data = in_memory if name == "memory" else opened  # type: ignore[method-assign]
        output = fresh(root / f"out-{name}")
        train(config(folder, root / "cache", output), LocalContext("cpu", progress=False))
        found = sorted(step_seconds(output))
        p99[name].append(found[int(0.99 * len(found))])
        return statistics.mean(found)

    found = in_turn(lambda: run("memory"), lambda: run("cache"), TIMES)
    ratio = statistics.median(b / a for a, b in zip(p99["memory"], p99["cache"], strict=True))
    return [
        Row("3", "stage-2 step from the cache / on tensors in memory, mean", found["ratio"], "<=", 1.02, found),
        Row("3", "the same, 99th percentile", ratio, "<=", 1.10, {**p99, "steps": SAMPLES}),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
