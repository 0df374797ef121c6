"""Stage 1: pictures in, cache out. Runs from a checkout, installed or not, and under `ray job submit`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)
# Ray's processes on this machine inherit it.
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]))
# A thread of Ray Data that outlives an interrupted job must not start a Ray of its own.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

from ray_diffsynth.cli import main  # noqa: E402
from ray_diffsynth.config import PreprocessConfig  # noqa: E402


def run(config: PreprocessConfig) -> None:
    """Hand over to the job; torch and ray are imported only now."""
    from ray_diffsynth.preprocess.job import run as run_job

    run_job(config)


if __name__ == "__main__":
    raise SystemExit(main(PreprocessConfig, run))
