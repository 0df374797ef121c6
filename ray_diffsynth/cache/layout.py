"""How a table is cut into Parquet's row groups and pages, by bytes: a page cannot hold 2 GiB, and readers hold a group.

pyarrow looks at a page's size after each `write_batch_size` values, 1,024 if it is not told: so many large values in a
row end in ArrowCapacityError.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

GROUP_BYTES = 1 << 30
PAGE_BYTES = 1 << 30
GROUP_ROWS = 1 << 20
BATCH_VALUES = 1024


def row_bytes(table: pa.Table) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Bytes of the texts and binaries of each row, (rows,)."""
    sizes = np.zeros(table.num_rows, np.int64)
    for column in _of_bytes(table):
        sizes += pc.fill_null(pc.binary_length(column), 0).to_numpy()
    return sizes


def largest_cell(table: pa.Table) -> int:
    """Bytes of the largest text or binary."""
    return max((pc.max(pc.binary_length(column)).as_py() or 0 for column in _of_bytes(table)), default=0)


def _of_bytes(table: pa.Table) -> Iterator[pa.ChunkedArray]:
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return (column for column in table.columns if any(kind(column.type) for kind in kinds))


def equal_groups(table: pa.Table, limit: int = GROUP_BYTES) -> int:
    """Rows of a row group when all have as many: all, unless they are more than `limit` bytes; at least one."""
    sizes = row_bytes(table)
    if sizes.sum() <= limit:
        return max(len(sizes), 1)
    return max(1, limit // int(sizes.max()))


def row_groups(table: pa.Table, limit: int = GROUP_BYTES, rows: int = GROUP_ROWS) -> Iterator[range]:
    """Consecutive rows of at most `limit` bytes (one larger row alone) and `rows` rows each; one of an empty table."""
    if not table.num_rows:
        yield range(0)
    ends = np.cumsum(row_bytes(table))
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        fits = int(np.searchsorted(ends, before + limit, side="right"))
        end = min(max(fits, start + 1), start + rows)
        yield range(start, end)
        start = end


def batch_values(table: pa.Table, limit: int = PAGE_BYTES) -> int | None:
    """`write_batch_size` with which no page grows far beyond `limit`; None where pyarrow's own does."""
    largest = largest_cell(table)
    if largest * min(table.num_rows, BATCH_VALUES) <= limit:
        return None
    return max(1, limit // largest)


def parquet_bytes(
    table: pa.Table,
    rows_per_group: int | None = None,
    *,
    limit: int = GROUP_BYTES,
    page: int = PAGE_BYTES,
    **options: object,
) -> pa.Buffer:
    """The table as a Parquet file, in row groups of so many rows, or else of at most `limit` bytes.

    `options` are those of pyarrow.parquet.ParquetWriter. Equal tables give equal bytes.
    """
    out = pa.BufferOutputStream()
    cuts = row_groups(table, limit) if rows_per_group is None else [range(table.num_rows)]
    with pq.ParquetWriter(out, table.schema, write_batch_size=batch_values(table, page), **options) as writer:
        for rows in cuts:
            group = table.slice(rows.start, len(rows))
            writer.write_table(group, row_group_size=rows_per_group or max(len(rows), 1))
    return out.getvalue()
