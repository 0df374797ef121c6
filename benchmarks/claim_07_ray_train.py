"""Claim 7: a step under Ray Train against the same loop under torchrun; and the rate of 2 workers against twice 1."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.caches import gaussian_cache
from benchmarks.harness import Row, main
from benchmarks.stage1 import fresh, local_ray
from benchmarks.stage2 import SIDE, config, model, step_seconds

SAMPLES, TIMES = 64, 5
ROOT = Path(__file__).resolve().parents[1]


def measure() -> list[Row]:
    from ray_diffsynth.training import job

    root = Path(tempfile.mkdtemp(prefix="claim-07-"))
    folder = model(root / "model")
    cache = root / "cache"
    gaussian_cache(cache, SAMPLES, side=SIDE)
    options = {"dtype": "float32", "lora_rank": 8, "save_steps": 10**6, "log_with": "none"}

    def ray(workers: int = 1) -> float:
        output = fresh(root / f"ray{workers}")
        settings = {"num_workers": workers, "resources": {"CPU": 1.0}}
        job.run(config(folder, cache, output, **settings))
        return median(step_seconds(output))

    def torchrun() -> float:
        output = fresh(root / "torchrun")
        flags = {"model": folder, "dataset_base_path": cache, "output_path": output, "task": "sft:train", **options}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [*launcher, str(ROOT / "jobs" / "train.py"), *words], check=True, env=environment, capture_output=True
        )
        return median(step_seconds(output))

    with local_ray():
        runs = [(torchrun(), ray(1), ray(2)) for _ in range(TIMES)]
    same, weak = [one / plain for plain, one, _ in runs], [one / two for _, one, two in runs]
    details = {"seconds_torchrun_ray1_ray2": runs, "ratios": same, "scaling": weak}
    # Of one worker a step has one sample, of two workers two: with perfect scaling it takes as long.
    return [
        Row("7", "Ray Train step / the same loop under torchrun, 1 worker", median(same), "<=", 1.01, details),
        Row("7", "weak scaling of stage 2, 1 -> 2 workers", median(weak), ">=", 0.9, {}),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
