"""The held-out samples: which they are, and their loss with fixed noise and timesteps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from accelerate import Accelerator

from ray_diffsynth.diffusion.randomness import SampleKey, permutation
from ray_diffsynth.errors import UserError
from ray_diffsynth.training.module import DiffusionTrainingModule
from ray_diffsynth.training.source import SampleSource

EPOCH = -1
"""The epoch in the keys of held-out samples: none of training, so that their noise is always the same."""

Rows = npt.NDArray[np.int64]


class ValidationError(UserError):
    """There is nothing to hold out, or nothing left to train on."""


def choose_rows(count: int, total: int, seed: int) -> Rows:
    """`count` of the index rows 0 … total - 1, sorted: a function of (total, seed). Raises ValidationError."""
    if count >= total:
        raise ValidationError(
            f"--validation_samples {count} leaves nothing to train on: there are {total} samples; hold out fewer"
        )
    return np.sort(permutation(total, "held-out", seed)[:count])


@dataclass(frozen=True)
class HeldOut:
    """The validation loss: mean over the held-out samples, each at one fixed timestep with one fixed noise."""

    source: SampleSource
    rows: Rows
    seed: int
    batch_size: int

    @torch.no_grad()
    def loss(self, module: DiffusionTrainingModule, engine: Accelerator, rank: int, world_size: int) -> float:
        """The same on every worker; all must call it. The model is in eval mode meanwhile."""
        device = module.pipe.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # sum of the losses, samples
        batches = list(self._microbatches(self.source.buckets))
        # As many forwards on each worker: a sharded model gathers its weights in all of them at once.
        rounds = -(-len(batches) // world_size)
        modes = [(child, child.training) for child in module.modules()]
        module.eval()
        try:
            for number in range(rounds):
                index = number * world_size + rank
                rows = batches[index % len(batches)]
                keys = [SampleKey(self.seed, EPOCH, 0, self.source.sample_ids[row]) for row in rows]
                with engine.autocast():
                    output = module(self.source.fetch(rows), keys)
                if index < len(batches):
                    sums += torch.tensor([float(output.per_sample.double().sum()), len(rows)]).to(sums)
        finally:
            for child, mode in modes:
                child.training = mode
        if world_size > 1:
            dist.all_reduce(sums)
        total, count = sums.tolist()
        return float(total / count)

    def _microbatches(self, buckets: Mapping[str, range]) -> Iterator[list[int]]:
        for rows in buckets.values():
            own = [int(row) for row in self.rows if row in rows]
            for start in range(0, len(own), self.batch_size):
                yield own[start : start + self.batch_size]
