"""Which sample is trained on when: a pure function of (index, seed, epoch), whatever the number of workers.

A shard is a run of consecutive index rows of one bucket, which lie together in the cache. The shards of all buckets
are shuffled; `window` of them are open at a time, and their rows are mixed and cut into microbatches of one bucket
each. Rows that do not fill a microbatch wait for the next window that has their bucket. The stream of microbatches is
then cut into `virtual_ranks` runs of neighbours, so that a shard is read by one virtual rank (two, where the cut falls
into a window) and not by all.

The number of virtual ranks is fixed when a run starts: a step trains one microbatch of each, whatever the number of
workers, which serve one or several. Checkpoints call them lanes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_diffsynth.diffusion.randomness import permutation

Rows = npt.NDArray[np.int64]

WINDOW = 4
"""Shards that a virtual rank has open at once."""


@dataclass(frozen=True)
class EpochOrder:
    """One epoch of training.

    rows: (steps, virtual ranks, batch size) index rows; rows[s, v] is one microbatch, all of one bucket.
    repeats: same shape: how often the row has come before in this epoch, which keys its noise.
    padded: number of entries beyond `repeat` times every row, which fill the last microbatches and the last step.
    """

    rows: Rows
    repeats: Rows
    padded: int

    @property
    def steps(self) -> int:
        return int(self.rows.shape[0])

    @property
    def virtual_ranks(self) -> int:
        return int(self.rows.shape[1])


def virtual_ranks_of(rank: int, world_size: int, virtual_ranks: int) -> list[int]:
    """The virtual ranks that worker `rank` of `world_size` serves: rank, rank + world_size, …

    Raises ValueError if a worker would have none: a step needs a microbatch from each.
    """
    if world_size > virtual_ranks:
        raise ValueError(
            f"{world_size} workers cannot share {virtual_ranks} virtual ranks: start the run with at least "
            f"{world_size} = workers x gradient_accumulation_steps, or use {virtual_ranks} workers"
        )
    return list(range(rank, virtual_ranks, world_size))


def open_shards(virtual_ranks: int) -> int:
    """Shards that a worker must keep to read each about once: the windows of its virtual ranks, and half as many for
    those that a virtual rank leaves and enters while another is in the middle of its own.
    """
    return virtual_ranks * WINDOW * 3 // 2


def steps_per_epoch(
    buckets: Mapping[str, range],
    *,
    batch_size: int,
    virtual_ranks: int,
    repeat: int = 1,
    without: Sequence[int] | Rows = (),
) -> int:
    """Optimizer steps of one epoch: what `epoch_order(...).steps` is, without making the order."""
    left_out = np.asarray(without, np.int64)
    counts = [len(rows) - int(((left_out >= rows.start) & (left_out < rows.stop)).sum()) for rows in buckets.values()]
    microbatches = sum(-(-count * repeat // batch_size) for count in counts)
    return -(-microbatches // virtual_ranks)


def epoch_order(
    buckets: Mapping[str, range],
    *,
    rows_per_shard: Mapping[str, int],
    seed: int,
    epoch: int,
    batch_size: int,
    virtual_ranks: int,
    repeat: int = 1,
    window: int = WINDOW,
    without: Sequence[int] | Rows = (),
) -> EpochOrder:
    """The order of one epoch over `buckets` (name -> its contiguous index rows).

    Every row comes exactly `repeat` times, and `padded` further entries fill what the batch size and the virtual ranks
    leave open: rows of the same bucket, microbatches of the same epoch. rows_per_shard: bucket -> rows that lie
    together. window: shards whose rows are mixed. without: rows that are never trained on (held out for validation).

    Raises ValueError for a number below 1 and for an index without rows to train on.
    """
    if min(batch_size, virtual_ranks, repeat, window) < 1:
        raise ValueError(
            f"batch_size={batch_size}, virtual_ranks={virtual_ranks}, repeat={repeat}, window={window}: each must be "
            ">= 1"
        )
    held_out = np.asarray(without, np.int64)
    if sum(len(rows) for rows in buckets.values()) <= len(held_out):
        raise ValueError("the index has no rows to order an epoch over")
    key = (seed, epoch)
    leftover: dict[str, Rows] = defaultdict(lambda: np.empty(0, np.int64))  # of a bucket: rows short of a microbatch
    steps: list[Rows] = []  # each (n, virtual ranks, batch_size)
    ahead: Rows = np.empty((0, batch_size), np.int64)  # microbatches short of a step for every virtual rank
    for turn in range(repeat):
        made = [ahead, *_microbatches(buckets, rows_per_shard, leftover, batch_size, window, (*key, turn), held_out)]
        if turn == repeat - 1:
            made.extend(_filled(buckets, leftover, batch_size, key, held_out))
        stream = np.concatenate(made)
        whole = len(stream) // virtual_ranks
        steps.append(_deal(stream[: whole * virtual_ranks], virtual_ranks))
        ahead = stream[whole * virtual_ranks :]
    if len(ahead):
        every = np.concatenate([*(s.reshape(-1, batch_size) for s in steps), ahead])
        again = permutation(len(every), "plan-last-step", *key)
        extra = np.resize(again, virtual_ranks - len(ahead))
        steps.append(_deal(np.concatenate([ahead, every[extra]]), virtual_ranks))
    rows = np.concatenate(steps)
    return EpochOrder(
        rows, _repeats(rows), rows.size - repeat * (sum(len(r) for r in buckets.values()) - len(held_out))
    )


def _deal(stream: Rows, virtual_ranks: int) -> Rows:
    """(n * virtual ranks, batch) -> (n, virtual ranks, batch): virtual rank v gets the v-th run of n neighbours."""
    return stream.reshape(virtual_ranks, -1, stream.shape[1]).swapaxes(0, 1)


def _microbatches(
    buckets: Mapping[str, range],
    rows_per_shard: Mapping[str, int],
    leftover: dict[str, Rows],
    batch_size: int,
    window: int,
    key: tuple[int, ...],
    held_out: Rows,
) -> Iterator[Rows]:
    """The (n, batch_size) microbatches of each window of one pass; what is left over stays in `leftover`."""
    shards = [
        (name, np.arange(start, min(start + rows_per_shard[name], rows.stop)))
        for name, rows in buckets.items()
        for start in range(rows.start, rows.stop, rows_per_shard[name])
    ]
    order = permutation(len(shards), "plan-shards", *key)
    kept = np.ones(max(rows.stop for rows in buckets.values()), np.bool_)
    kept[held_out] = False
    for number, first in enumerate(range(0, len(order), window)):
        opened: dict[str, list[Rows]] = defaultdict(list)
        for shard in order[first : first + window]:
            name, rows = shards[shard]
            opened[name].append(rows[kept[rows]])
        cut = []
        for name, parts in opened.items():
            fresh = np.concatenate(parts)
            fresh = fresh[permutation(len(fresh), "plan-rows", *key, number, name)]
            rows = np.concatenate([leftover[name], fresh])
            whole = len(rows) // batch_size * batch_size
            leftover[name] = rows[whole:]
            cut.append(rows[:whole].reshape(-1, batch_size))
        mixed = np.concatenate(cut)
        yield mixed[permutation(len(mixed), "plan-microbatches", *key, number)]


def _filled(
    buckets: Mapping[str, range], leftover: Mapping[str, Rows], batch_size: int, key: tuple[int, ...], held_out: Rows
) -> Iterator[Rows]:
    """The last microbatch of each bucket that has rows left, filled up with rows of the same bucket."""
    for name, rows in leftover.items():
        if len(rows):
            bucket = buckets[name]
            others = permutation(len(bucket), "plan-fill", *key, name) + bucket.start
            others = others[~np.isin(others, held_out)]
            # Rows that the microbatch does not hold come first, as long as there are any.
            others = np.concatenate([others[~np.isin(others, rows)], others])
            fill = np.resize(others, batch_size - len(rows))
            yield np.concatenate([rows, fill])[None]


def _repeats(rows: Rows) -> Rows:
    """For every entry, in the order of training, how many earlier entries name the same row."""
    flat = rows.reshape(-1)
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.arange(len(flat)) - np.repeat(starts, np.diff(np.r_[starts, len(flat)]))
    repeats = np.empty_like(flat)
    repeats[order] = counts
    return repeats.reshape(rows.shape)
