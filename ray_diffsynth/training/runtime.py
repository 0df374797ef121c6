"""What a worker knows of the run around it: its rank and device, where it reports, whether it should stop.

The training loop takes a `WorkerRuntime`. `LocalRuntime` serves plain `python` and torchrun, `training.ray.worker` Ray.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

import torch

from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.training.report.metrics_log import TrainingProgress
from ray_diffsynth.training.report.sample_prompts import SamplePrompt, plan_samples


class WorkerRuntime(Protocol):
    """Where one worker of a run computes, and whom it talks to.

    world_rank, world_size: this worker's number, from 0, and how many there are; torch.distributed is set up (or will
    be, from the environment) when there is more than one. device: where it computes.
    """

    @property
    def world_rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step: the line of metrics.jsonl. Called by rank 0 alone; waits for no other worker."""
        ...

    def stop_requested(self) -> bool:
        """Whether this worker was asked to end; asked once a step. The run then saves a checkpoint and ends."""
        ...

    def own_samples(self, plan: TrainPlan) -> Sequence[SamplePrompt]:
        """The sample images that the workers draw themselves, between steps; none where an actor does it."""
        ...

    def draw_samples(self, step: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Have sample images drawn with these trained weights (by parameter name); called by rank 0, does not wait.

        Not called where the workers draw themselves.
        """
        ...


class LocalRuntime:
    """Plain `python` (one worker) or torchrun (its environment variables). SIGTERM asks the run to save and end."""

    def __init__(self, device: str | None = None, *, progress: bool = True) -> None:
        self.world_rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        cuda = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.device = torch.device(device or (cuda if torch.cuda.is_available() else "cpu"))
        self._progress = TrainingProgress() if progress else None
        self._stop = threading.Event()

    def report(self, metrics: Mapping[str, Any]) -> None:
        if self._progress is not None:
            self._progress.update(metrics)

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def own_samples(self, plan: TrainPlan) -> Sequence[SamplePrompt]:
        return plan_samples(plan)

    def draw_samples(self, step: int, weights: Mapping[str, torch.Tensor]) -> None:
        raise RuntimeError("without Ray there is no actor that draws")

    def request_stop(self) -> None:
        self._stop.set()

    def catch_sigterm(self) -> None:
        """From now on SIGTERM ends the run at the next step, with a checkpoint. For the main thread only."""

        def handler(number: int, frame: FrameType | None) -> None:
            self.request_stop()

        signal.signal(signal.SIGTERM, handler)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
