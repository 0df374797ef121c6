"""The driver's side of the monitors: where they are, and what is shown of what they count."""

import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from ray_diffsynth.cluster.joined import on_this_node
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.metrics import PoolMetrics
from ray_diffsynth.preprocess.monitor import Monitor
from ray_diffsynth.preprocess.monitor_state import Counts
from ray_diffsynth.progress import Progress

logger = logging.getLogger(__name__)


@contextmanager
def monitors_here(count: int) -> Iterator[list[Any]]:
    """So many monitors beside this process, on its machine, which has their journals."""
    with tempfile.TemporaryDirectory(prefix="ray-diffsynth-") as folder:
        here = Monitor.options(scheduling_strategy=on_this_node())  # type: ignore[attr-defined]
        monitors = [here.remote(os.path.join(folder, f"{number}.jsonl")) for number in range(count)]
        try:
            yield monitors
        finally:
            for monitor in monitors:
                ray.kill(monitor)


@contextmanager
def watch(
    runs: Sequence[GroupRun], monitors: Sequence[Any], stop: threading.Event, progress: Progress
) -> Iterator[None]:
    """Within it, `progress` and Ray's metrics follow the monitors, and `stop` is set when one of them gives up."""
    over = threading.Event()
    metrics = [PoolMetrics(run.name, run.rows) for run in runs]

    def look() -> None:
        counts: list[Counts] = ray.get([monitor.get.remote() for monitor in monitors])
        if any(count.fatal for count in counts):
            stop.set()
        rates = [metric.update(count) for metric, count in zip(metrics, counts, strict=True)]
        values: dict[str, float | str] = {"quarantined": str(sum(count.failed for count in counts))}
        values["MB"] = f"{sum(count.nbytes for count in counts) / 1e6:.1f}"
        if len(runs) > 1:
            values |= {run.name: f"{rate:.3g}/s" for run, rate in zip(runs, rates, strict=True)}
        progress.update(sum(count.written + count.failed for count in counts), **values)

    def follow() -> None:
        while not over.wait(0.5):
            try:
                look()
            except ray.exceptions.RayError as error:
                logger.warning("the progress is not shown any more: %s", error)
                return

    thread = threading.Thread(target=follow, name="encode-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    look()
