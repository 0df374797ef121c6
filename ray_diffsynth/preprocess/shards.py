"""Which rows are encoded together: pure functions from the wanted keys to shards.

A shard is what is encoded or lost as a whole: one decode task, one actor call, one Parquet file. Its members follow
from the wanted keys alone, so an interrupted run and its rerun write the same files, byte for byte.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray_diffsynth.cache.store import shard_name
from ray_diffsynth.data.buckets import Bucket, rows_per_shard
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.plan.cache_keys import GroupPlan
from ray_diffsynth.preprocess.records import Sample

EMPTY_CAPTION = "(the empty caption)"
ALL_SIZES = "all"
"""Bucket name of rows that do not depend on a size (captions)."""
TEXT_ROWS = 32


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row that the cache must hold: its key, one sample that has these inputs, and that sample's row and bucket.

    `files`: its file parameters as they enter the key, by their contents. `decode_bytes`: memory that decoding them
    takes at its peak, and `kept_bytes`: what of it stays.
    """

    key: str
    sample_id: str
    row: Mapping[str, Any]
    bucket: str
    size: Bucket
    files: Mapping[str, Any] = field(default_factory=dict)
    decode_bytes: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Rows of one bucket that are encoded and committed together as `<group>/<name>.parquet`."""

    name: str
    bucket: str
    rows: tuple[Wanted, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(row.key for row in self.rows)


def wanted_rows(
    group: GroupPlan, samples: Iterable[tuple[Sample, str]], spec: SampleSpec, empty_key: str | None = None
) -> Iterator[Wanted]:
    """The rows of `group` that the samples need, each given with its key, in their order.

    `empty_key`: of the row of the empty caption, which comes first where it is given.
    """
    columns = {spec.columns[name] for name in group.inputs if name in spec.columns}
    params = [name for name in group.inputs if name in spec.file_params]
    if any(name in spec.own_sized for name in params):  # their sizes stand in the bucket by their order
        columns |= {spec.columns[name] for name in spec.own_sized}
    smallest = Bucket(16, 16)
    if empty_key is not None:
        yield Wanted(empty_key, EMPTY_CAPTION, {spec.columns["prompt"]: ""}, ALL_SIZES, smallest)
    for sample, key in samples:
        row = {column: sample.row[column] for column in columns}
        bucket = sample.bucket.name if group.bucketed else ALL_SIZES
        files = {name: sample.inputs[name] for name in params}
        memory = (sample.decode_bytes, sample.kept_bytes) if params else (0, 0)
        yield Wanted(key, sample.sample_id, row, bucket, sample.bucket, files, *memory)


def not_known(wanted: Iterable[Wanted], known: Collection[str]) -> Iterator[Wanted]:
    """Those whose key is not in `known`."""
    return (row for row in wanted if row.key not in known)


def shard_rows(bucket: str, size: Bucket) -> int:
    """Rows of a full shard of a bucket."""
    return TEXT_ROWS if bucket == ALL_SIZES else rows_per_shard(size)


def plan_shards(wanted: Iterable[Wanted]) -> Iterator[ShardPlan]:
    """Cut the wanted rows, in their order, into full shards of one bucket each; every distinct key once."""
    open_rows: dict[str, list[Wanted]] = {}
    seen: set[str] = set()
    for row in wanted:
        if row.key in seen:
            continue
        seen.add(row.key)
        rows = open_rows.setdefault(row.bucket, [])
        rows.append(row)
        if len(rows) == shard_rows(row.bucket, row.size):
            yield _close(row.bucket, open_rows.pop(row.bucket))
    for bucket, rows in open_rows.items():
        yield _close(bucket, rows)


def _close(bucket: str, rows: Sequence[Wanted]) -> ShardPlan:
    return ShardPlan(shard_name([row.key for row in rows]), bucket, tuple(rows))


def split(shard: ShardPlan, keys: Collection[str]) -> list[ShardPlan]:
    """The shard as two: the rows of these keys, and the others; nothing where one of them would be empty."""
    parts = [tuple(row for row in shard.rows if (row.key in keys) == inside) for inside in (True, False)]
    return [_close(shard.bucket, part) for part in parts] if all(parts) else []


def halves(shard: ShardPlan) -> list[ShardPlan]:
    """The shard as two of half its rows, to find the row that kills its encoder; one of a single row as it is."""
    middle = len(shard.rows) // 2
    parts = (shard.rows[:middle], shard.rows[middle:])
    return [_close(shard.bucket, part) for part in parts if part]


def remaining(shard: ShardPlan, done: Collection[str]) -> ShardPlan | None:
    """The shard without the keys that are `done`; None if nothing is left."""
    rows = tuple(row for row in shard.rows if row.key not in done)
    if len(rows) == len(shard.rows):
        return shard
    return replace(shard, name=shard_name([row.key for row in rows]), rows=rows) if rows else None
