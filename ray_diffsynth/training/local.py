"""Training without Ray: one process, or those that torchrun started."""

from __future__ import annotations

import logging
import signal
import threading
import time
from dataclasses import replace
from typing import Any

from ray_diffsynth.cache.lease import Lease
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.identity import check_chosen
from ray_diffsynth.training.report.summary import write_training_report
from ray_diffsynth.training.runtime import LocalRuntime
from ray_diffsynth.training.start import Start
from ray_diffsynth.training.trainer import train

logger = logging.getLogger(__name__)


def run(config: TrainConfig) -> dict[str, Any]:
    """Train in this process; rank 0 returns what it wrote into report.json, the others nothing.

    SIGTERM lets it save a checkpoint; then SystemExit(143).
    """
    started = time.monotonic()
    runtime = LocalRuntime()
    if threading.current_thread() is threading.main_thread():
        runtime.catch_sigterm()
    for name in ("resources", "ray_address", "sample_resources", "env"):
        if runtime.world_rank == 0 and getattr(config, name) is not None:
            logger.warning("--%s has no effect here: this run is without Ray", name)
    if config.resume != "auto" and runtime.world_size > 1:
        raise TrainingError(
            f"--resume {config.resume} does not work under torchrun, where every process starts alike; use "
            "--resume auto, and a new --output_path to start anew"
        )
    plan = RunPlan.resolve(config)
    with Lease(plan.output_path) as held:
        if runtime.world_rank == 0:  # the others read nothing that it moves
            held.acquire()
            start = Start.of(config)
            if start.chosen is not None:
                check_chosen(plan, start.chosen, start.resume)
            start.begin()
        config = replace(config, resume="auto")
        try:
            result = train(replace(plan, config=config), runtime)
        finally:
            runtime.close()
        report = {}
        if runtime.world_rank == 0:
            held.check()
            seconds = time.monotonic() - started
            report = write_training_report(config, result, workers=runtime.world_size, seconds=seconds)
    if runtime.stop_requested() and not result.finished:
        raise SystemExit(128 + signal.SIGTERM)
    return report
