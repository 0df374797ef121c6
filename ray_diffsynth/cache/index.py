"""What the index and the quarantine of a cache hold, and what is checked of an index before it is used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.names import check_shards

QUARANTINE_SCHEMA = pa.schema([(n, pa.string()) for n in ("sample_id", "source", "error", "message", "group", "key")])
"""`group` and `key`: of what could not be encoded; null for a row that failed before that."""

CAPTION = "caption"
"""A further column of the index, for people: the caption, null where there is none. No reader keeps it."""


def index_schema(groups: Iterable[str]) -> pa.Schema:
    """sample_id, source, bucket, then key, file, row group and row in each group."""
    columns = [(name, pa.string()) for name in ("sample_id", "source", "bucket")]
    for group in groups:
        columns += [(f"{group}_key", pa.string()), (f"{group}_file", pa.string())]
        columns += [(f"{group}_row_group", pa.int32()), (f"{group}_row", pa.int32())]
    return pa.schema(columns)


def bucket_ranges(index: pa.Table) -> dict[str, range]:
    """Bucket -> its rows in the index. Raises CacheError when a bucket's rows are not together."""
    ranges: dict[str, range] = {}
    if not index.num_rows:
        return ranges
    runs = pc.run_end_encode(index.column("bucket").combine_chunks())
    start = 0
    for run in runs.chunks if isinstance(runs, pa.ChunkedArray) else [runs]:
        for end, name in zip(run.run_ends.to_pylist(), run.values.to_pylist(), strict=True):
            if name in ranges:
                raise CacheError(f"the rows of bucket {name} are not together in the index; sort it by bucket first")
            ranges[name] = range(start, end)
            start = end
    return ranges


def check_places(index: pa.Table, groups: Iterable[str], where: str) -> None:
    """Raise UnsafeNameError for an index that names what is no shard, CacheError for a place that cannot be."""
    if empty := [name for name in index.column_names if name != "source" and index.column(name).null_count]:
        raise CacheError(f"{where} has no {empty[0]} for some sample; it is damaged")
    for group in groups:
        check_shards(pc.unique(index.column(f"{group}_file")).to_pylist(), where)
        for name in ("row_group", "row"):
            if index.num_rows and pc.min(index.column(f"{group}_{name}")).as_py() < 0:
                raise CacheError(f"{where} has a negative {name} in the group {group}; it is damaged")


def add_strings(digest: Any, column: pa.ChunkedArray) -> None:
    """Add the lengths of a column's strings, then the strings."""
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    for chunk in chunks:
        digest.update(pc.binary_length(chunk).to_numpy(zero_copy_only=False).astype("<i4").tobytes())
    for chunk in chunks:
        ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        digest.update(memoryview(chunk.buffers()[2] or b"")[ends[0] : ends[-1]])
