"""Rows as Arrow columns of which no value depends on another row: what a row wrote is what is read from them.

The type of a column follows from what the column is for, never from its values, so that any cut of a dataset into
record batches has the same types.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

SAMPLE_ID = "sample_id"
FILES = pa.struct([pa.field("paths", pa.list_(pa.string())), pa.field("is_list", pa.bool_())])
"""Type of a column of files: the paths of a row, and whether the row wrote a list (of one file, say) or a file."""
BATCH_ROWS = 16384
"""Rows of a record batch."""


@dataclass(frozen=True)
class RowColumns:
    """The columns that are used of a dataset, in their order, by what they are for.

    `files`: paths, as `FILES`. `texts`: captions, as string. All others hold canonical JSON (`to_json`), which is
    parsed where the value is used.
    """

    names: tuple[str, ...]
    files: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()

    @property
    def schema(self) -> pa.Schema:
        """`sample_id`, then the columns; it depends on no value."""
        fields = [(name, FILES if name in self.files else pa.string()) for name in self.names]
        return pa.schema([(SAMPLE_ID, pa.string()), *fields])

    def table(self, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> pa.Table:
        """Sample ids and rows as a table; a column that a row lacks is null. Raises TypeError: see `to_json`."""
        batches: list[pa.RecordBatch] = []
        pending: list[tuple[str, Mapping[str, Any]]] = []
        for row in rows:
            pending.append(row)
            if len(pending) == BATCH_ROWS:
                batches.append(self._batch(pending))
                pending = []
        return pa.Table.from_batches([*batches, self._batch(pending)], self.schema)

    def rows(self, table: pa.Table | pa.RecordBatch) -> Iterator[dict[str, Any]]:
        """The inverse of `table`: each row with `sample_id` and its values as it wrote them."""
        batches = table.to_batches(max_chunksize=BATCH_ROWS) if isinstance(table, pa.Table) else [table]
        for batch in batches:
            values = [self.values(batch, name) for name in self.names]
            for sample_id, *row in zip(batch.column(SAMPLE_ID).to_pylist(), *values, strict=True):
                yield {SAMPLE_ID: sample_id, **dict(zip(self.names, row, strict=True))}

    def _batch(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> pa.RecordBatch:
        columns = [pa.array([sample_id for sample_id, _ in rows], pa.string())]
        for name in self.names:
            values = [_none_if_nan(row.get(name)) for _, row in rows]
            if name in self.files:
                columns.append(self.files_column(values))
            else:
                texts = values if name in self.texts else [None if v is None else to_json(v) for v in values]
                columns.append(pa.array(texts, pa.string()))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    @staticmethod
    def files_column(values: Sequence[Any]) -> pa.Array:
        """Files, or lists of them, as a column of `FILES`."""
        lists = [isinstance(value, list | tuple) for value in values]
        paths = pa.array([None if value is None else paths_of(value) for value in values], FILES.field("paths").type)
        return pa.StructArray.from_arrays(
            [paths, pa.array(lists, pa.bool_())], fields=list(FILES), mask=paths.is_null()
        )

    def values(self, batch: pa.RecordBatch, name: str) -> list[Any]:
        """The values of a column as the rows wrote them."""
        stored = batch.column(name)
        if name in self.files and not stored.null_count and not stored.field("is_list").true_count:
            stored = stored.field("paths").flatten()
        elif name in self.files:
            return [None if v is None else v["paths"] if v["is_list"] else v["paths"][0] for v in stored.to_pylist()]
        elif name not in self.texts:
            return [None if text is None else json.loads(text) for text in stored.to_pylist()]
        values: list[Any] = stored.to_pylist()
        return values


def _none_if_nan(value: Any) -> Any:
    """pandas writes NaN for nothing, into columns of texts too."""
    return None if isinstance(value, float) and value != value else value


def paths_of(value: Any) -> list[Any]:
    """The files of a value, which may be one or a list of them."""
    return list(value) if isinstance(value, list | tuple) else [value]


def to_json(value: Any) -> str:
    """The value as canonical JSON: names sorted, no spaces, characters as they are.

    Raises TypeError for a value that JSON does not have (a date, bytes), ValueError for one that holds itself.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
