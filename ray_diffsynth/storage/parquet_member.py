"""The bytes in one cell of a Parquet file, such as an image of a `datasets` file: one column of one row group is read.

Neighbouring rows lie in one row group, so the last ones are kept for a moment: a file read in its order fetches each of
its row groups once.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import IO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ray_diffsynth.storage.parquet import open_parquet
from ray_diffsynth.storage.raw import open_raw
from ray_diffsynth.storage.watched import WatchedFile

KEPT_BYTES = 256 << 20
"""Row groups that are kept, in bytes; the last one always is."""
MAX_GROUP_BYTES = (2 << 30) - 1
"""Largest column of a row group; a larger one has no 32-bit offsets."""


@dataclass(frozen=True)
class _Footer:
    metadata: pq.FileMetaData
    starts: tuple[int, ...]
    """First row of each row group, and the number of rows."""


_Key = tuple[str, str, int, int]
_lock = threading.Lock()
_footers: OrderedDict[tuple[str, str], _Footer] = OrderedDict()
_groups: OrderedDict[_Key, pa.ChunkedArray] = OrderedDict()


def read_cell(path: str, stamp: str, row: int, leaf: int, item: int | None = None) -> bytes:
    """The bytes in the leaf column of a row; `item`: of which entry, where the column holds lists.

    `stamp`: the file's version, by which row groups that are kept are known. Raises ValueError for a cell that is not
    there or holds no bytes, OSError.
    """
    with _lock:
        footer = _footer(path, stamp)
        if not 0 <= row < footer.starts[-1] or not 0 <= leaf < footer.metadata.num_columns:
            raise ValueError(f"it has no row {row} with a column {leaf}: the file was changed")
        group = bisect_right(footer.starts, row) - 1
        column = _group(path, stamp, footer, group, leaf)
    value = column[row - footer.starts[group]].as_py()
    if item is not None:
        value = value[item] if isinstance(value, list) and item < len(value) else None
    while isinstance(value, dict) and value:
        value = next(iter(value.values()))
    if not isinstance(value, bytes):
        raise ValueError(f"row {row} holds no bytes; write the images into the file, or name them by paths alone")
    return value


def _footer(path: str, stamp: str) -> _Footer:
    key = (path, stamp)
    if not stamp or key not in _footers:
        with _opened(path) as parquet:
            metadata = parquet.metadata
        rows = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
        _footers[key] = _Footer(metadata, (0, *accumulate(rows)))
        while len(_footers) > 16:
            _footers.popitem(last=False)
    _footers.move_to_end(key)
    return _footers[key]


def _group(path: str, stamp: str, footer: _Footer, group: int, leaf: int) -> pa.ChunkedArray:
    key = (path, stamp, group, leaf)
    if not stamp or key not in _groups:
        held = footer.metadata.row_group(group).column(leaf)
        if held.total_uncompressed_size > MAX_GROUP_BYTES:
            raise ValueError(
                f"its row group {group} holds {held.total_uncompressed_size / 2**30:.1f} GiB of {held.path_in_schema}, "
                "more than is read at once; write the file with smaller row groups, of 100 rows say"
            )
        with _opened(path) as parquet:
            table = parquet.read_row_group(group, columns=[held.path_in_schema], use_threads=False)
        _groups[key] = table.column(0)
        while len(_groups) > 1 and sum(column.nbytes for column in _groups.values()) > KEPT_BYTES:
            _groups.popitem(last=False)
    _groups.move_to_end(key)
    return _groups[key]


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """Within it, what cannot be read of the file raises ValueError, and OSError where that is its storage's fault."""
    # What is asked for, and no more: the footer and a column of a row group lie far apart.
    with open_raw(path, cache_type="none") as file:
        watched = WatchedFile(cast("IO[bytes]", file))
        try:
            with pa.PythonFile(watched, mode="r") as source, open_parquet(source, path) as parquet:
                yield parquet
        except OSError as error:
            if watched.error is not None:
                raise
            raise ValueError(f"damaged ({error})") from error  # as pyarrow calls pages that it cannot read
