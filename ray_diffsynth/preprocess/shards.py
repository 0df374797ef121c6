"""Which rows are encoded together (`plan_shards` cuts them), and what becomes of a shard that was lost.

A shard is what is encoded or lost as a whole: one decode task, one actor call, one Parquet file. Its members follow
from the wanted keys alone, so an interrupted run and its rerun write the same files, byte for byte.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
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


def wanted_row(group: GroupPlan, sample: Sample, key: str, spec: SampleSpec) -> Wanted:
    """The row of `group` that a sample needs, whose key is given."""
    columns = {spec.columns[name] for name in group.inputs if name in spec.columns}
    params = [name for name in group.inputs if name in spec.file_params]
    if any(name in spec.own_sized for name in params):  # their sizes stand in the bucket by their order
        columns |= {spec.columns[name] for name in spec.own_sized}
    row = {column: sample.row[column] for column in columns}
    bucket = sample.bucket.name if group.bucketed else ALL_SIZES
    files = {name: sample.inputs[name] for name in params}
    memory = (sample.decode_bytes, sample.kept_bytes) if params else (0, 0)
    return Wanted(key, sample.sample_id, row, bucket, sample.bucket, files, *memory)


def empty_caption_row(key: str, spec: SampleSpec) -> Wanted:
    """The row of the empty caption."""
    return Wanted(key, EMPTY_CAPTION, {spec.columns["prompt"]: ""}, ALL_SIZES, Bucket(16, 16))


def shard_rows(bucket: str, size: Bucket | None) -> int:
    """Rows of a full shard of a bucket."""
    return TEXT_ROWS if bucket == ALL_SIZES or size is None else rows_per_shard(size)


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
