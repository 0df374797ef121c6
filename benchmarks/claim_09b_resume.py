"""Claim 9b: stage 2 ended at 10 % and at 90 % of an epoch: the time to the first step after resume; the losses."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.caches import gaussian_cache
from benchmarks.harness import Row, in_turn, main
from benchmarks.stage1 import fresh
from benchmarks.stage2 import SIDE, Timed, config, model

SAMPLES, TIMES = 200, 5


def measure() -> list[Row]:
    import torch

    from ray_diffsynth.plan.run_plan import RunPlan
    from ray_diffsynth.training.report.metrics_log import read_metrics
    from ray_diffsynth.training.trainer import train

    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="claim-09b-"))
    folder = model(root / "model", layers=1)
    gaussian_cache(root / "cache", SAMPLES, side=SIDE)

    def losses(output: Path) -> list[float]:
        return [line["loss"] for line in read_metrics(str(output))]

    train(RunPlan.resolve(config(folder, root / "cache", root / "whole")), Timed())
    for percent in (10, 90):
        train(
            RunPlan.resolve(config(folder, root / "cache", root / f"at{percent}")),
            Timed(stop_after=SAMPLES * percent // 100),
        )

    def resume(percent: int) -> float:
        output = fresh(root / "resumed")
        shutil.copytree(root / f"at{percent}", output)
        context = Timed(stop_after=1)
        train(RunPlan.resolve(config(folder, root / "cache", output)), context)
        return context.done[0]

    found = in_turn(lambda: resume(10), lambda: resume(90), TIMES)
    different = 0
    for percent in (10, 90):
        output = root / f"at{percent}"
        train(RunPlan.resolve(config(folder, root / "cache", output)), Timed())
        different += sum(a != b for a, b in zip(losses(output), losses(root / "whole"), strict=True))
    return [
        Row(
            "9b", "time to the first step after resume at 90 % / at 10 % of an epoch", found["ratio"], "<=", 1.1, found
        ),
        Row("9b", "losses that differ from those of the uninterrupted run", different, "<=", 0, {"steps": 2 * SAMPLES}),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
