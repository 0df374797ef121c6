"""Rows <-> Arrow: `key`, `checksum`, and three columns per parameter (binary, shape, dtype). No extension types.

The same tables travel between Ray tasks (codec `none`) and lie in Parquet files, where plain pyarrow, pandas and DuckDB
open them. A parameter that a row does not have (a unit may return less than it declares) is null in all three columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ray_diffsynth.cache.codec import CodecError, Encoded, check_codec, decode_value, encode_value
from ray_diffsynth.cache.errors import CacheError as CacheError

KEY, CHECKSUM = "key", "checksum"
SHAPE_SUFFIX, DTYPE_SUFFIX = "_shape", "_dtype"


def table_schema(parameters: Iterable[str]) -> pa.Schema:
    """Columns of a group's table. Raises CacheError when two parameters would share a column."""
    fields = [pa.field(KEY, pa.string(), nullable=False), pa.field(CHECKSUM, pa.string(), nullable=False)]
    for name in parameters:
        fields.append(pa.field(name, pa.large_binary()))
        fields.append(pa.field(name + SHAPE_SUFFIX, pa.list_(pa.int32())))
        fields.append(pa.field(name + DTYPE_SUFFIX, pa.string()))
    names = [field.name for field in fields]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CacheError(f"the parameters need the column {repeated[0]!r} twice in the cache; rename one of them")
    return pa.schema(fields)


def table_parameters(schema: pa.Schema) -> tuple[str, ...]:
    """The parameters of a group's table, in order. Raises CacheError for another kind of table."""
    names = list(schema.names)
    parameters = tuple(names[2::3])
    if names[:2] != [KEY, CHECKSUM] or set(table_schema(parameters).names) != set(names):
        raise CacheError(f"the columns {', '.join(names)} are not those of a cache table")
    return parameters


def encode_values(values: Mapping[str, Any], codec: str) -> dict[str, Encoded]:
    """Every parameter of a row, encoded. Raises CodecError naming the parameter."""
    encoded = {}
    for name, value in values.items():
        try:
            encoded[name] = encode_value(value, codec)
        except CodecError as error:
            raise CodecError(f"parameter {name!r}: {error}") from error
    return encoded


def _checksum(key: str, cells: Iterable[tuple[str, Any, Sequence[int], str]], codec: str) -> str:
    digest = xxhash.xxh3_64(f"{codec}\n{key}".encode())
    for name, data, shape, dtype in cells:
        digest.update(f"\n{name}\n{dtype}\n{list(shape)}\n".encode())
        digest.update(data)
    return f"xxh3:{digest.hexdigest()}"


def checksum(key: str, values: Mapping[str, Encoded], codec: str) -> str:
    """XXH3-64 over a row's key, codec, and the names, dtypes, shapes and stored bytes of its parameters in name order.

    A guard against damage and mixed-up codecs, not against forgery. Training checks each row that it reads, so speed
    decides: XXH3 runs at the speed of memory, where zlib's CRC-32 took a fifth of the reader's time.
    """
    cells = ((name, value.data, value.shape, value.dtype) for name, value in sorted(values.items()))
    return _checksum(key, cells, codec)


def table_from_rows(
    keys: Sequence[str], rows: Sequence[Mapping[str, Any]], parameters: Sequence[str], codec: str
) -> pa.Table:
    """One table row per (key, values). Raises CacheError for a value that no column is for, CodecError for its type."""
    check_codec(codec)
    schema = table_schema(parameters)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for key, values in zip(keys, rows, strict=True):
        if unknown := sorted(set(values) - set(parameters)):
            raise CacheError(f"row {key} has the parameter {unknown[0]!r}, the table only {', '.join(parameters)}")
        encoded = encode_values(values, codec)
        columns[KEY].append(key)
        columns[CHECKSUM].append(checksum(key, encoded, codec))
        for name in parameters:
            value = encoded.get(name)
            columns[name].append(None if value is None else value.data)
            columns[name + SHAPE_SUFFIX].append(None if value is None else value.shape)
            columns[name + DTYPE_SUFFIX].append(None if value is None else value.dtype)
    return pa.Table.from_pydict(columns, schema=schema)


@dataclass(frozen=True, slots=True)
class RowView:
    """One row of a table, still encoded.

    cells: parameter -> (its bytes, a view into the table; shape; dtype). A parameter that the row lacks is not there.
    """

    key: str
    stored_checksum: str
    cells: Mapping[str, tuple[pa.Buffer, list[int], str]]

    def is_intact(self, codec: str) -> bool:
        """Whether the stored checksum is that of the cells."""
        cells = ((name, data, shape, dtype) for name, (data, shape, dtype) in sorted(self.cells.items()))
        return _checksum(self.key, cells, codec) == self.stored_checksum

    def decode(self, codec: str) -> dict[str, Any]:
        """Parameter -> value. Raises CodecError naming the parameter."""
        values = {}
        for name, (data, shape, dtype) in self.cells.items():
            try:
                values[name] = decode_value(data, shape, dtype, codec)
            except CodecError as error:
                raise CodecError(f"row {self.key}, parameter {name!r}: {error}") from error
        return values


def _buffers(column: pa.ChunkedArray) -> list[pa.Buffer]:
    """The bytes of each cell, where they lie: an Arrow scalar would be a copy of them. Empty for null."""
    found = []
    for chunk in column.cast(pa.large_binary()).chunks:
        _, offsets, data = chunk.buffers()
        bounds = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        found += [(data or _EMPTY).slice(start, end - start) for start, end in pairwise(bounds)]
    return found


_EMPTY = pa.py_buffer(b"")


def row_views(table: pa.Table) -> list[RowView]:
    """All rows of a table. Raises CacheError for another kind of table, or a value without its shape."""
    columns = []
    for name in table_parameters(table.schema):
        data = _buffers(table.column(name))
        shapes, dtypes = (table.column(name + suffix).to_pylist() for suffix in (SHAPE_SUFFIX, DTYPE_SUFFIX))
        if any(
            dtype is not None and (shape is None or None in shape) for shape, dtype in zip(shapes, dtypes, strict=True)
        ):
            raise CacheError(f"the parameter {name!r} of some row has no shape")
        columns.append([(name, cell) for cell in zip(data, shapes, dtypes, strict=True)])
    heads = zip(table.column(KEY).to_pylist(), table.column(CHECKSUM).to_pylist(), strict=True)
    return [
        RowView(key, checksum, {name: cell for name, cell in (column[at] for column in columns) if cell[2] is not None})
        for at, (key, checksum) in enumerate(heads)
    ]


def rows_from_table(table: pa.Table, codec: str, *, verify: bool = True) -> list[tuple[str, dict[str, Any]]]:
    """(key, parameter -> value) of every row. Raises CacheError when a checksum does not hold, CodecError."""
    rows = []
    for view in row_views(table):
        if verify and not view.is_intact(codec):
            raise CacheError(f"row {view.key} does not match its checksum with the codec {codec}")
        rows.append((view.key, view.decode(codec)))
    return rows
