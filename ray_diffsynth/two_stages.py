"""`ray-diffsynth pipeline`: preprocess, and training from its cache as soon as that is committed, as one job."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ray_diffsynth.cli import prepare_ray, run_told
from ray_diffsynth.cluster.session import ray_session
from ray_diffsynth.config import PreprocessConfig, TrainConfig
from ray_diffsynth.config.both_stages import parse_both
from ray_diffsynth.preprocess import job as preprocess
from ray_diffsynth.program import command
from ray_diffsynth.training.ray import job as training

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the configurations of both stages, and run them; the exit code."""
    prepare_ray()
    first, second = parse_both(argv, prog=command("pipeline"))
    verbose = first.verbose or second.verbose
    return run_told(lambda: run(first, second), verbose=verbose, output_path=second.output_path)


def run(first: PreprocessConfig, second: TrainConfig) -> dict[str, Any]:
    """Both stages on one Ray; returns what report.json of the training holds.

    Each goes on where an earlier attempt was ended. What stage 1 raises ends the job before anything is trained.
    """
    with ray_session(second.ray_address, verbose=second.verbose, env=None):  # each stage has variables of its own
        preprocess.run(first)
        logger.info("the cache %s is committed; training begins", first.output_path)
        return training.run(second)
