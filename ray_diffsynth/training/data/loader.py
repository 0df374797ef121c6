"""The microbatches of one worker, in order, read ahead of the training thread."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.diffusion.transfer import pinned
from ray_diffsynth.training.data.captions import drop_captions
from ray_diffsynth.training.data.epoch_order import EpochOrder, epoch_order, steps_per_epoch, virtual_ranks_of
from ray_diffsynth.training.data.source import SampleSource, prefetch, shard_sizes

DEPTH = 4
"""Microbatches read ahead."""


@dataclass(frozen=True)
class Microbatch:
    """What one virtual rank trains on in one step.

    step: counts from 0. rows: index rows, `batch_size` of them; keys: of their noise and timesteps, one a row. last:
    whether it is the worker's last virtual rank of the step, after which the gradients are summed.
    """

    step: int
    epoch: int
    virtual_rank: int
    last: bool
    rows: tuple[int, ...]
    keys: tuple[SampleKey, ...]


@dataclass(frozen=True)
class MicrobatchLoader:
    """Reads a run's microbatches, whose order is a function of position; steps count from 0 at the start of the run.

    held_out: rows that are not trained on. caption_dropout: part of the samples that get the empty caption.
    pin: put tensors where a GPU fetches them by itself.
    """

    source: SampleSource
    seed: int
    batch_size: int
    virtual_ranks: int
    repeat: int
    held_out: tuple[int, ...] = ()
    caption_dropout: float = 0.0
    pin: bool = False

    @cached_property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(
            self.source.buckets,
            batch_size=self.batch_size,
            virtual_ranks=self.virtual_ranks,
            repeat=self.repeat,
            without=self.held_out,
        )

    @property
    def trained_samples(self) -> int:
        """How many samples are trained on, each once in a pass."""
        return len(self.source.sample_ids) - len(self.held_out)

    @property
    def samples_per_step(self) -> int:
        return self.virtual_ranks * self.batch_size

    def order(self, epoch: int) -> EpochOrder:
        return epoch_order(
            self.source.buckets,
            rows_per_shard=shard_sizes(self.source.buckets),
            seed=self.seed,
            epoch=epoch,
            batch_size=self.batch_size,
            virtual_ranks=self.virtual_ranks,
            repeat=self.repeat,
            without=self.held_out,
        )

    def microbatches(self, start: int, stop: int, rank: int, world_size: int) -> Iterator[Microbatch]:
        """Those of worker `rank` in the steps from `start` up to `stop`."""
        own = virtual_ranks_of(rank, world_size, self.virtual_ranks)
        per_epoch = self.steps_per_epoch
        epochs = range(start // per_epoch, -(-stop // per_epoch))
        # Each epoch's order is made while the one before it is trained on.
        for epoch, order in prefetch(epochs, self.order, depth=1, threads=1):
            first = epoch * per_epoch
            for step in range(max(start, first), min(stop, first + per_epoch)):
                for virtual_rank in own:
                    rows = order.rows[step - first, virtual_rank].tolist()
                    repeats = order.repeats[step - first, virtual_rank].tolist()
                    keys = [
                        SampleKey(self.seed, epoch, repeat, self.source.sample_ids[row])
                        for row, repeat in zip(rows, repeats, strict=True)
                    ]
                    yield Microbatch(step, epoch, virtual_rank, virtual_rank == own[-1], tuple(rows), tuple(keys))

    def read(
        self, start: int, stop: int, rank: int, world_size: int, threads: int = 0
    ) -> Generator[tuple[Microbatch, Sequence[dict[str, Any]]]]:
        """`microbatches` with their samples, fetched on `threads` threads (0: by the machine)."""
        threads = threads or max(1, min(4, (os.cpu_count() or 1) // 2))
        items = self.microbatches(start, stop, rank, world_size)
        return prefetch(items, self.fetch, depth=max(DEPTH, threads), threads=threads)

    def fetch(self, item: Microbatch) -> Sequence[dict[str, Any]]:
        """The samples of a microbatch, as they are trained on."""
        samples: Sequence[dict[str, Any]] = self.source.fetch(item.rows)
        if self.caption_dropout:
            samples = drop_captions(samples, item.keys, self.caption_dropout, self.source.empty_caption())
        return [pinned(sample) for sample in samples] if self.pin else samples
