"""The statistics of a step: the line that metrics.jsonl, the trackers and the progress bar get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ray_diffsynth.diffusion.transfer import to_device

SIGMA_BUCKETS = 4
"""Equal parts of sigma in [0, 1] whose losses are logged apart."""


def sigma_name(bucket: int) -> str:
    """`loss_sigma_0.25-0.50`"""
    return f"loss_sigma_{bucket / SIGMA_BUCKETS:.2f}-{(bucket + 1) / SIGMA_BUCKETS:.2f}"


@dataclass
class StepSums:
    """What the workers add up in one all-reduce a step: losses, requests to stop, and losses by sigma.

    values: [sum of the virtual ranks' losses, workers that were asked to stop, per bucket sum and number of samples].
    """

    values: torch.Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> StepSums:
        return cls(torch.zeros(2 + 2 * SIGMA_BUCKETS, dtype=torch.float64, device=device))

    def add(self, loss: torch.Tensor, per_sample: torch.Tensor, sigma: torch.Tensor) -> None:
        """One microbatch; waits for no device."""
        self.values[0] += loss.detach()
        buckets = to_device((sigma * SIGMA_BUCKETS).long().clamp(0, SIGMA_BUCKETS - 1), self.values.device)
        self.values[2 : 2 + SIGMA_BUCKETS].index_add_(0, buckets, per_sample.detach().to(self.values))
        ones = torch.ones_like(per_sample, dtype=self.values.dtype, device=self.values.device)
        self.values[2 + SIGMA_BUCKETS :].index_add_(0, buckets, ones)


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step gave, the same on every worker but for the times.

    loss: mean over the virtual ranks. grad_norm: before clipping. data_wait: seconds, of `seconds` in all, that the
    data was not there. stop: whether a worker was asked to end. sigma_sums, sigma_counts: sum of the losses and number
    of samples of each of the `SIGMA_BUCKETS`.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    data_wait: float
    seconds: float
    stop: bool
    sigma_sums: list[float]
    sigma_counts: list[float]


@dataclass
class Window:
    """The steps since the last logged line."""

    steps: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * SIGMA_BUCKETS)
    counts: list[float] = field(default_factory=lambda: [0.0] * SIGMA_BUCKETS)

    def add(self, outcome: StepOutcome) -> None:
        self.steps += 1
        self.seconds += outcome.seconds
        self.data_wait += outcome.data_wait
        self.sums = [a + b for a, b in zip(self.sums, outcome.sigma_sums, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, outcome.sigma_counts, strict=True)]

    def numbers(self, samples_per_step: int, device: torch.device) -> dict[str, Any]:
        """Rates and losses by sigma over the window, and the most memory since the start."""
        found: dict[str, Any] = {
            "samples_per_second": self.steps * samples_per_step / self.seconds,
            "data_wait": self.data_wait / self.seconds,
        }
        if device.type == "cuda":
            found["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        for bucket, (total, count) in enumerate(zip(self.sums, self.counts, strict=True)):
            if count:
                found[sigma_name(bucket)] = total / count
        return found
