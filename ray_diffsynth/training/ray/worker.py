"""Ray's side of one worker, and the actor that carries its messages."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from ray_diffsynth.data.warnings import DataWarnings
from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.training.report.sample_prompts import SamplePrompt

POLL_SECONDS = 0.5
STOP_SECONDS = 0.1
"""How often a worker asks whether it should stop: of the few seconds that it may have for a checkpoint."""
MAX_PENDING_GRIDS = 4
"""Grids that may wait for the actor that makes them; further ones are left out."""


class RayRuntime:
    """A worker of Ray Train. collector, sampler: handles of the actors below; samples: those that no actor draws."""

    def __init__(self, collector: Any, sampler: Any = None, samples: Sequence[SamplePrompt] = ()) -> None:
        context = ray.train.get_context()
        self.world_rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        # Without a GPU of its own Ray Train would name the first of the machine's.
        self.device: torch.device = ray.train.torch.get_device() if ray.get_gpu_ids() else torch.device("cpu")
        self.collector, self.sampler, self._samples = collector, sampler, samples
        self._unsent: dict[str, Any] | None = None
        self._sent_at = 0.0
        self._drawing: list[Any] = []
        self._asked: Any = None
        self._asked_at = 0.0
        self._stop = False

    def report(self, metrics: Mapping[str, Any]) -> None:
        # Not ray.train.report: it makes all the workers wait for each other. No oftener than the driver looks.
        self._unsent = dict(metrics)
        if time.monotonic() - self._sent_at >= POLL_SECONDS:
            self.send_metrics()

    def send_metrics(self) -> None:
        """Send the newest metrics now, if they are not sent yet."""
        if self._unsent is not None:
            self.collector.add.remote(self._unsent)
            self._unsent, self._sent_at = None, time.monotonic()

    def stop_requested(self) -> bool:
        """What the driver wants, as rank 0 heard it last: never waits for the answer."""
        if self.world_rank != 0 or self._stop:
            return self._stop
        if self._asked is None:
            if time.monotonic() - self._asked_at >= STOP_SECONDS:
                self._asked, self._asked_at = self.collector.stop_wanted.remote(), time.monotonic()
        elif ray.wait([self._asked], timeout=0)[0]:
            self._stop, self._asked = bool(ray.get(self._asked)), None
        return self._stop

    def own_samples(self, plan: TrainPlan) -> Sequence[SamplePrompt]:
        return self._samples

    def draw_samples(self, step: int, weights: Mapping[str, torch.Tensor]) -> None:
        if self.sampler is None:
            return
        if self._drawing:
            _, self._drawing = ray.wait(self._drawing, num_returns=len(self._drawing), timeout=0)
        if len(self._drawing) >= MAX_PENDING_GRIDS:
            self.collector.log.remote(f"no sample images of step {step}: {MAX_PENDING_GRIDS} grids are still waiting")
            return
        arrays = {name: value.float().numpy() for name, value in weights.items()}
        self._drawing.append(self.sampler.draw.remote(step, arrays))

    def wait_for_samples(self) -> None:
        """Until the images that were asked for are made: they need the weights that this process holds."""
        if self._drawing:
            ray.wait(self._drawing, num_returns=len(self._drawing))


class _ToDriver(logging.Handler):
    """Sends this package's messages to the collector, which the driver shows: a worker's own stderr stays unseen."""

    def __init__(self, collector: Any) -> None:
        super().__init__(logging.INFO)
        self._collector = collector

    def emit(self, record: logging.LogRecord) -> None:
        self._collector.log.remote(record.getMessage(), record.levelno)


@contextmanager
def messages_to_driver(runtime: RayRuntime) -> Iterator[None]:
    """Within it the user sees what rank 0 says; the others would say the same."""
    log = logging.getLogger("ray_diffsynth")
    handler = _ToDriver(runtime.collector) if runtime.world_rank == 0 else logging.NullHandler()
    before = log.level, log.propagate
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


@ray.remote(num_cpus=0)
class Collector:
    """Carries messages, metrics and the result from rank 0 to the driver, and the driver's wish to stop to rank 0."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] | None = None
        self._result: dict[str, Any] | None = None
        self._messages: list[tuple[str, int]] = []
        self._warnings: list[list[str]] = []
        self._nodes: list[str] = []
        self._stop = False

    def worker_begins(self, node: str) -> None:
        """A worker of the group is there, on this node."""
        self._nodes.append(node)

    def nodes(self, workers: int) -> list[str]:
        """The nodes of the group's workers, once all of these are there; none before."""
        return self._nodes if len(self._nodes) >= workers else []

    def add(self, metrics: dict[str, Any]) -> None:
        self._latest = metrics

    def log(self, message: str, level: int = logging.WARNING) -> None:
        self._messages.append((message, level))

    def warn(self, rows: list[list[str]]) -> None:
        """Take warnings of the prompts of sample images (`DataWarnings.rows`), for the terminal and the report."""
        self._warnings += rows
        for line in DataWarnings.of(rows).lines():
            self.log(f"--validation_prompts: {line}")

    def warnings(self) -> list[list[str]]:
        return self._warnings

    def take(self) -> tuple[dict[str, Any] | None, list[tuple[str, int]]]:
        """The newest metrics, and messages with their level; each once."""
        latest, self._latest = self._latest, None
        messages, self._messages = self._messages, []
        return latest, messages

    def request_stop(self) -> None:
        self._stop = True

    def stop_wanted(self) -> bool:
        return self._stop

    def begin(self) -> None:
        """A new group of workers starts."""
        self._stop, self._nodes, self._result = False, [], None

    def finish(self, result: dict[str, Any]) -> None:
        self._result = result

    def result(self) -> dict[str, Any]:
        if self._result is None:
            raise RuntimeError("the workers ended without a result")
        return self._result
