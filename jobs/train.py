"""Stage 2: cache in, LoRA out. Runs from a checkout, installed or not, and under `ray job submit`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)
# Ray's processes on this machine inherit it.
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]))

from ray_diffsynth.cli import main  # noqa: E402
from ray_diffsynth.config import TrainConfig  # noqa: E402


def run(config: TrainConfig) -> None:
    """Hand over to the job; torch and ray are imported only now."""
    from ray_diffsynth.training.ray.job import run as run_job

    run_job(config)


if __name__ == "__main__":
    raise SystemExit(main(TrainConfig, run))
