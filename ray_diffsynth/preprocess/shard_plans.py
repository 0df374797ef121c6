"""The shards of a group as columns: the key and the sample of each row. A `ShardPlan` is made when it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from ray_diffsynth.cache.store import shard_name
from ray_diffsynth.plan.cache_keys import GroupPlan
from ray_diffsynth.preprocess.key_columns import Keys, Mask, Numbers, first_of_each, packed, reduced, unpacked
from ray_diffsynth.preprocess.samples import SampleReader, Samples
from ray_diffsynth.preprocess.shards import ALL_SIZES, ShardPlan, empty_caption_row, shard_rows, wanted_row

EMPTY = -1
"""Stands for a sample's number in the row of the empty caption."""


class ShardPlans(Sequence[ShardPlan]):
    """Shards to be encoded, in their order.

    keys, numbers: of all rows, shard after shard. ends: where each shard ends among them. buckets: of each shard.
    """

    def __init__(
        self,
        group: GroupPlan,
        samples: Samples,
        keys: Keys,
        numbers: Numbers,
        ends: Numbers,
        buckets: Sequence[str],
    ) -> None:
        self.group, self.samples = group, samples
        self.keys, self.numbers, self.ends, self.buckets = keys, numbers, ends, buckets

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return len(self.keys)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, at: int) -> ShardPlan: ...
    @overload
    def __getitem__(self, at: slice) -> list[ShardPlan]: ...
    def __getitem__(self, at: int | slice) -> ShardPlan | list[ShardPlan]:
        if isinstance(at, slice):
            return list(self.of(range(len(self))[at]))
        return self._plan(range(len(self))[at], self.samples.reader())

    def __iter__(self) -> Iterator[ShardPlan]:
        return self.of(range(len(self)))

    def of(self, numbers: Sequence[int] | Numbers) -> Iterator[ShardPlan]:
        """The shards of these numbers, one after another."""
        reader = self.samples.reader()
        return (self._plan(int(number), reader) for number in numbers)

    def _rows_of(self, shard: int) -> slice:
        return slice(int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard]))

    def _plan(self, shard: int, reader: SampleReader) -> ShardPlan:
        where = self._rows_of(shard)
        keys, numbers = unpacked(self.keys[where]), self.numbers[where]
        empty = int(len(numbers) > 0 and numbers[0] == EMPTY)  # it is the first row of all
        spec = self.samples.spec
        rows = [empty_caption_row(keys[0], spec)] if empty else []
        found = zip(reader.take(numbers[empty:]), keys[empty:], strict=True)
        rows += (wanted_row(self.group, sample, key, spec) for sample, key in found)
        return ShardPlan(shard_name(keys), self.buckets[shard], tuple(rows))

    def names(self) -> Iterator[str]:
        """The name of each shard."""
        return (shard_name(unpacked(self.keys[self._rows_of(shard)])) for shard in range(len(self)))

    def without(self, done: Mask) -> ShardPlans:
        """The shards, each without the rows that are `done`, where anything is left of them."""
        left = np.concatenate([[0], np.cumsum(~done)])[np.concatenate([[0], self.ends])]
        kept = np.diff(left) > 0
        buckets = [bucket for bucket, some in zip(self.buckets, kept.tolist(), strict=True) if some]
        return ShardPlans(self.group, self.samples, self.keys[~done], self.numbers[~done], left[1:][kept], buckets)

    def holding(self, which: Mask) -> list[ShardPlan]:
        """The shards with any of these rows."""
        return list(self.of(np.flatnonzero(~reduced(~which, self.ends))))


def plan_shards(group: GroupPlan, samples: Samples, keys: Keys, wanted: Mask, empty: str | None = None) -> ShardPlans:
    """Cut the wanted samples' rows, in their order, into full shards of one bucket each; every distinct key once.

    `keys`: of all samples' rows. `empty`: the key of the empty caption's row where it is wanted; it comes first. What
    is left of a bucket when its full shards are cut is a shard after all full ones.
    """
    first = first_of_each(keys[wanted])
    numbers = np.flatnonzero(wanted)[first]
    if empty is not None:
        alike = keys[numbers] == packed([empty])
        numbers = np.concatenate([[EMPTY], numbers[~alike]]).astype(np.int64)
    full: list[tuple[str, int, int]] = []
    rest: list[tuple[str, int, int]] = []
    for name, size, start, end in _stretches(group, samples, numbers):
        cuts = range(start, end, size)
        full += ((name, at, at + size) for at in cuts if at + size <= end)
        rest += ((name, at, end) for at in cuts if at + size > end)
    shards = [*full, *rest]
    order = [np.arange(start, end) for _, start, end in shards]
    ordered = numbers[np.concatenate([*order, np.empty(0, np.int64)]).astype(np.int64)]
    ends = np.cumsum([end - start for _, start, end in shards], dtype=np.int64)
    own = keys if empty is None else np.append(keys, packed([empty]))  # where EMPTY points to
    return ShardPlans(group, samples, own[ordered], ordered, ends, [name for name, *_ in shards])


def _stretches(group: GroupPlan, samples: Samples, numbers: Numbers) -> Iterator[tuple[str, int, int, int]]:
    """(bucket, rows of a full shard, start, end) of the wanted rows of one bucket, which lie together."""
    if not group.bucketed:
        yield ALL_SIZES, shard_rows(ALL_SIZES, None), 0, len(numbers)
        return
    start = total = 0
    for bucket, rows in samples.buckets.items():
        total += rows
        end = int(np.searchsorted(numbers, total))
        yield bucket.name, shard_rows(bucket.name, bucket), start, end
        start = end
