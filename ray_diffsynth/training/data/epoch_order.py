"""Which sample is trained on when: a pure function of (index, seed, epoch), whatever the number of workers.

A shard is a run of consecutive index rows of one bucket, which lie together in the cache. The shards of all buckets
are shuffled; `window` of them are open at a time, and their rows are mixed and cut into microbatches of one bucket
each. Rows that do not fill a microbatch wait for the next window that has their bucket. The stream of microbatches is
then cut into `lanes` runs of neighbours, so that a shard is read by one lane (two, where the cut falls into a window)
and not by all.
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
"""Shards that a lane has open at once."""


@dataclass(frozen=True)
class Plan:
    """One epoch of training.

    rows: (steps, lanes, batch_size) index rows; rows[s, l] is one microbatch, all of one bucket.
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
    def lanes(self) -> int:
        return int(self.rows.shape[1])


def lanes_of(rank: int, world_size: int, lanes: int) -> list[int]:
    """The lanes that worker `rank` of `world_size` serves: rank, rank + world_size, …

    Raises ValueError if a worker would have none: a step needs a microbatch from each.
    """
    if world_size > lanes:
        raise ValueError(
            f"{world_size} workers cannot share {lanes} lanes: start the run with at least "
            f"{world_size} = workers x gradient_accumulation_steps, or use {lanes} workers"
        )
    return list(range(rank, lanes, world_size))


def open_shards(lanes: int) -> int:
    """Shards that a worker must keep to read each about once: the windows of its lanes, and half as many for those that
    a lane leaves and enters while another is in the middle of its own.
    """
    return lanes * WINDOW * 3 // 2


def steps_per_epoch(
    buckets: Mapping[str, range],
    *,
    batch_size: int,
    lanes: int,
    repeat: int = 1,
    without: Sequence[int] | Rows = (),
) -> int:
    """Optimizer steps of one epoch: what `epoch_plan(...).steps` is, without making the plan."""
    left_out = np.asarray(without, np.int64)
    counts = [len(rows) - int(((left_out >= rows.start) & (left_out < rows.stop)).sum()) for rows in buckets.values()]
    microbatches = sum(-(-count * repeat // batch_size) for count in counts)
    return -(-microbatches // lanes)


def epoch_plan(
    buckets: Mapping[str, range],
    *,
    rows_per_shard: Mapping[str, int],
    seed: int,
    epoch: int,
    batch_size: int,
    lanes: int,
    repeat: int = 1,
    window: int = WINDOW,
    without: Sequence[int] | Rows = (),
) -> Plan:
    """The plan of one epoch over `buckets` (name -> its contiguous index rows).

    Every row comes exactly `repeat` times, and `padded` further entries fill what the batch size and the lanes leave
    open: rows of the same bucket, microbatches of the same epoch. rows_per_shard: bucket -> rows that lie together.
    without: rows that are never trained on (held out for validation).
    """
    if min(batch_size, lanes, repeat, window) < 1:
        raise ValueError(f"batch_size={batch_size}, lanes={lanes}, repeat={repeat}, window={window}: each must be >= 1")
    held_out = np.asarray(without, np.int64)
    if sum(len(rows) for rows in buckets.values()) <= len(held_out):
        raise ValueError("the index has no rows to plan an epoch over")
    key = (seed, epoch)
    waiting: dict[str, Rows] = defaultdict(lambda: np.empty(0, np.int64))  # of a bucket: rows short of a microbatch
    steps: list[Rows] = []  # each (n, lanes, batch_size)
    ahead: Rows = np.empty((0, batch_size), np.int64)  # microbatches short of a step for every lane
    for turn in range(repeat):
        made = [ahead, *_microbatches(buckets, rows_per_shard, waiting, batch_size, window, (*key, turn), held_out)]
        if turn == repeat - 1:
            made.extend(_filled(buckets, waiting, batch_size, key, held_out))
        stream = np.concatenate(made)
        whole = len(stream) // lanes
        steps.append(_deal(stream[: whole * lanes], lanes))
        ahead = stream[whole * lanes :]
    if len(ahead):
        every = np.concatenate([*(s.reshape(-1, batch_size) for s in steps), ahead])
        again = permutation(len(every), "plan-last-step", *key)
        extra = np.resize(again, lanes - len(ahead))
        steps.append(_deal(np.concatenate([ahead, every[extra]]), lanes))
    rows = np.concatenate(steps)
    return Plan(rows, _repeats(rows), rows.size - repeat * (sum(len(r) for r in buckets.values()) - len(held_out)))


def _deal(stream: Rows, lanes: int) -> Rows:
    """(n * lanes, batch) -> (n, lanes, batch): lane l gets the l-th run of n neighbours."""
    return stream.reshape(lanes, -1, stream.shape[1]).swapaxes(0, 1)


def _microbatches(
    buckets: Mapping[str, range],
    rows_per_shard: Mapping[str, int],
    waiting: dict[str, Rows],
    batch_size: int,
    window: int,
    key: tuple[int, ...],
    held_out: Rows,
) -> Iterator[Rows]:
    """The (n, batch_size) microbatches of each window of one pass; what is left over stays in `waiting`."""
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
            rows = np.concatenate([waiting[name], fresh])
            whole = len(rows) // batch_size * batch_size
            waiting[name] = rows[whole:]
            cut.append(rows[:whole].reshape(-1, batch_size))
        mixed = np.concatenate(cut)
        yield mixed[permutation(len(mixed), "plan-microbatches", *key, number)]


def _filled(
    buckets: Mapping[str, range], waiting: Mapping[str, Rows], batch_size: int, key: tuple[int, ...], held_out: Rows
) -> Iterator[Rows]:
    """The last microbatch of each bucket that has rows left, filled up with rows of the same bucket."""
    for name, rows in waiting.items():
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
