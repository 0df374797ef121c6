"""Claim 7: a step under Ray Train against the same loop under torchrun; and the rate of 2 workers against twice 1.

The three take turns of some steps each, so that what slows this machine for a while slows all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.caches import gaussian_cache
from benchmarks.harness import ROOT, Row, main
from benchmarks.stage1 import local_ray
from benchmarks.stage2 import OPTIONS, SIDE, config, model
from benchmarks.turns import Turns, in_turn

SAMPLES, STEPS, TURN = 64, 320, 16


def measure() -> list[Row]:
    from ray_diffsynth.training.ray import job

    root = Path(tempfile.mkdtemp(prefix="claim-07-"))
    folder = model(root / "model")
    cache = root / "cache"
    gaussian_cache(cache, SAMPLES, side=SIDE)
    turns = Turns({"torchrun": 1, "ray-1": 1, "ray-2": 2})
    work, port = job._worker, turns.port
    options = {"num_epochs": 2 * STEPS // SAMPLES + 1, "max_steps": STEPS}

    def worker(arguments: dict[str, Any]) -> None:
        member = f"ray-{arguments['config'].num_workers}"
        # Not job's: a function whose name is taken is sent with globals of its own.
        work.__globals__["RayRuntime"] = in_turn(job.RayRuntime, port, member, TURN)
        work(arguments)

    job._worker = worker

    def ray(workers: int) -> None:
        job.run(config(folder, cache, root / f"ray-{workers}", num_workers=workers, resources={"CPU": 1.0}, **options))

    def torchrun() -> None:
        output = root / "torchrun"
        flags = {"model": folder, "dataset_base_path": cache, "output_path": output, "task": "sft:train"}
        flags |= {**OPTIONS, **options}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        member = ["benchmarks.turns", str(port), "torchrun", str(TURN)]
        subprocess.run([*launcher, *member, *words], check=True, env=environment, capture_output=True)

    # Three workers are alive, but no more than two at work.
    with local_ray(cpus=3), ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(torchrun), pool.submit(ray, 1), pool.submit(ray, 2)]
        for run in runs:
            run.result()
    turns.join()
    plain, one, two = (seconds[1:] for seconds in turns.seconds.values())
    # Without Ray a worker is asked once more at its end, and so has a turn more.
    same = [b / a for a, b in zip(plain, one, strict=False)]
    weak = [a / b for a, b in zip(one, two, strict=False)]
    details = {"ratios": same, "scaling": weak, "median_s": [median(found) / TURN for found in (plain, one, two)]}
    # Of one worker a step has one sample, of two workers two: with perfect scaling it takes as long.
    return [
        Row("7", "Ray Train step / the same loop under torchrun, 1 worker", median(same), "<=", 1.01, details),
        Row("7", "weak scaling of stage 2, 1 -> 2 workers", median(weak), ">=", 0.9, {}),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
