"""The held-out samples: which they are, and their loss with fixed noise and timesteps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ray_diffsynth.diffusion.randomness import SampleKey, permutation
from ray_diffsynth.errors import UserError
from ray_diffsynth.training.data.epoch_order import Rows
from ray_diffsynth.training.data.source import SampleSource, prefetch
from ray_diffsynth.training.module import DiffusionTrainingModule
from ray_diffsynth.training.precision import Precision
from ray_diffsynth.training.shard import check_equal_work

EPOCH = -1
"""The epoch in the keys of held-out samples: none of training, so that their noise is always the same."""


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
class ValidationLoss:
    """The validation loss: mean over the held-out samples, each at one fixed timestep with one fixed noise."""

    source: SampleSource
    rows: Rows
    seed: int
    batch_size: int
    sharded: bool = False
    """Whether the workers share a model out, so that they must run it equally often."""

    @torch.no_grad()
    def loss(self, module: DiffusionTrainingModule, precision: Precision, rank: int, world_size: int) -> float:
        """The same on every worker; all must call it. The model is in eval mode meanwhile."""
        device = torch.device(module.pipe.device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # sum of the losses, samples
        batches = list(self._microbatches(self.source.buckets))
        # As many forwards on each worker: a sharded model gathers its weights in all of them at once.
        rounds = -(-len(batches) // world_size)
        modes = [(child, child.training) for child in module.modules()]
        module.eval()
        try:
            own = [number * world_size + rank for number in range(rounds)]
            items = [(index, batches[index % len(batches)]) for index in own]
            with closing(prefetch(items, lambda item: self.source.fetch(item[1]), depth=2, threads=1)) as read:
                for (index, rows), samples in read:
                    keys = [SampleKey(self.seed, EPOCH, 0, self.source.sample_ids[row]) for row in rows]
                    if self.sharded:
                        check_equal_work(samples, world_size, device)
                    with precision.autocast():
                        output = module(samples, keys)
                    if index < len(batches):
                        sums[0] += output.per_sample.double().sum()
                        sums[1] += len(rows)
        finally:
            for child, mode in modes:
                child.training = mode
        if world_size > 1:
            dist.all_reduce(sums)
        total, count = sums.tolist()
        return float(total / count)

    def _microbatches(self, buckets: Mapping[str, range]) -> Iterator[list[int]]:
        for rows in buckets.values():
            own = self.rows[(self.rows >= rows.start) & (self.rows < rows.stop)].tolist()
            for start in range(0, len(own), self.batch_size):
                yield own[start : start + self.batch_size]
