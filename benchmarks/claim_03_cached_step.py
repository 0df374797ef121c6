"""Claim 3: a step of stage 2 that reads the cache against the same step on samples that are in memory: mean and p99.

Two trainings take turns step by step, so that what slows this machine for a while slows both.
"""

from __future__ import annotations

import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.caches import gaussian_cache
from benchmarks.harness import Row, main
from benchmarks.stage1 import fresh
from benchmarks.stage2 import SIDE, config, model, train_in_turn
from benchmarks.turns import Turns

SAMPLES, EPOCHS = 128, 7


def measure() -> list[Row]:
    import torch

    from ray_diffsynth.plan.run_plan import TrainPlan
    from ray_diffsynth.training import trainer

    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="claim-03-"))
    folder = model(root / "model")
    gaussian_cache(root / "cache", SAMPLES, side=SIDE)
    opened, turns = trainer.open_data, Turns({"memory": 1, "cache": 1})

    def open_data(plan: TrainPlan) -> Any:
        source = opened(plan)
        if plan.output_path.endswith("memory"):
            samples = source.fetch(range(SAMPLES))
            source.fetch = lambda rows: [dict(samples[row]) for row in rows]  # type: ignore[method-assign]
        return source

    trainer.open_data = open_data

    def run(name: str) -> None:
        settings = config(folder, root / "cache", fresh(root / f"out-{name}"), num_epochs=EPOCHS)
        train_in_turn(settings, turns, name, after="memory" if name == "cache" else None)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, turns.seconds))
    turns.join()
    memory, cache = (seconds[5:] for seconds in turns.seconds.values())
    size = len(cache) // EPOCHS
    parts = [(memory[at : at + size], cache[at : at + size]) for at in range(0, EPOCHS * size, size)]
    means = [statistics.mean(b) / statistics.mean(a) for a, b in parts]
    p99 = [_p99(b) / _p99(a) for a, b in parts]
    details = {"ratios": means, "p99_ratios": p99, "steps": len(cache)}
    details["median_s"] = [statistics.median(memory), statistics.median(cache)]
    what = "stage-2 step from the cache / on tensors in memory, mean"
    return [
        Row("3", what, statistics.median(means), "<=", 1.02, details),
        Row("3", "the same, 99th percentile", statistics.median(p99), "<=", 1.10, {}),
    ]


def _p99(steps: list[float]) -> float:
    return sorted(steps)[int(0.99 * len(steps))]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
