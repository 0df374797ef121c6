"""The rows of a dataset with their sample ids: what can be used, and what cannot, with the reason."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_diffsynth import storage
from ray_diffsynth.data.column_names import ColumnNames
from ray_diffsynth.data.formats import DatasetError, RawRow
from ray_diffsynth.data.layouts import Layout, read_layout
from ray_diffsynth.data.row_checks import RowCheck, escaped
from ray_diffsynth.data.rows import SAMPLE_ID, RowColumns
from ray_diffsynth.data.sample_ids import SampleIds

__all__ = ["DatasetError", "Metadata", "Quarantined", "read_metadata", "resolve_file"]

DUPLICATE = "DuplicateRow"
"""Error class of an exact repetition of another row."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A sample that is left out: its id, where it comes from, the class of the error and a message."""

    sample_id: str
    source: str
    error: str
    message: str


@dataclass(frozen=True)
class Metadata:
    """The usable rows, of which `rows` gives the values; total = rows + rejected.

    `table`: `sample_id`, then the columns that are used, in the file's order, as `columns` says (`RowColumns`).
    """

    table: pa.Table
    columns: RowColumns
    rejected: list[Quarantined]
    total: int

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each row with its `sample_id` and its values as they were written."""
        return self.columns.rows(self.table)


def resolve_file(base_path: str, value: str) -> str:
    """Path or URL of a file that a metadata row names: relative to `base_path`, absolute, or a URL.

    A name stored in another Unicode normal form than the disk's (a dataset zipped on macOS) is found too, and one with
    the backslashes of Windows.
    """
    path = storage.join(base_path, value)
    if storage.member_of(path) is not None:
        return path
    if (
        "\\" in value
        and not storage.exists(path)
        and storage.exists(other := storage.join(base_path, value.replace("\\", "/")))
    ):
        return other
    if not storage.is_remote(path) and not os.path.exists(path):
        for form in ("NFC", "NFD"):
            other = storage.join(base_path, unicodedata.normalize(form, value))
            if os.path.exists(other):
                return other
    return path


def _check_columns(layout: Layout, required: Sequence[str], names: ColumnNames) -> None:
    rows = layout.table.rows
    if not rows:
        raise DatasetError(f"{layout.path} has no rows; write one for each sample, below the names of the columns")
    if all(row.values is None for row in rows):
        raise DatasetError(f"{layout.path} has no readable row; the first: {rows[0].error}")
    for column in required:
        if column not in layout.table.columns:
            raise names.missing(layout.path, column, layout.columns)
    if SAMPLE_ID in layout.table.columns:
        raise DatasetError(f"{layout.path}: the column name 'sample_id' is taken by ray_diffsynth; rename it")


def read_metadata(
    base_path: str,
    metadata_path: str | None = None,
    *,
    file_columns: Sequence[str] = ("image",),
    text_columns: Sequence[str] = ("prompt",),
    required: Sequence[str] = ("image", "prompt"),
    parsers: Mapping[str, Callable[[Any], Any]] | None = None,
    column_names: Mapping[str, str] | None = None,
    split: str | None = None,
) -> Metadata:
    """Read a dataset's metadata and give every row an id.

    Without `metadata_path` it is `metadata.{csv,json,jsonl,parquet}` in `base_path`, the archives in it, the Parquet
    shards of a split (`split`, else the only one or train), else the folder's images with `.txt` captions. Rejected
    are rows that cannot be read (MalformedRow), that lack a required value (MissingValue) or have it in another type
    (InvalidValue), and exact repetitions (DuplicateRow). An empty caption is a caption.

    `column_names`: column -> what it is called in the files, where that differs; the rows have it by its own name.
    Only the columns that are named travel: files, texts and what is required.

    `parsers`: column -> what makes its value of the one that stands in the file (a csv holds texts only); when it
    raises ValueError, the row is rejected with that message.

    Raises DatasetError when nothing can be read: no file, no rows, no such column.
    """
    called = ColumnNames(tuple(file_columns), tuple(text_columns), column_names or {})
    wanted = tuple(dict.fromkeys([*file_columns, *text_columns, *required]))
    layout = read_layout(base_path, metadata_path, called, wanted, split)
    _check_columns(layout, required, called)
    raw = layout.table
    names = tuple(name for name in raw.columns if name in wanted)
    files = [column for column in file_columns if column in names]
    texts = [column for column in text_columns if column in names]
    check = RowCheck(files, texts, required, names, raw.absent_text, parsers or {}, called.shown)
    rejected: list[Quarantined] = []

    def accepted() -> Iterator[tuple[str, Mapping[str, Any]]]:
        ids = SampleIds()

        def reject(sample_id: str, row: RawRow, error: str, message: str) -> None:
            rejected.append(Quarantined(sample_id, escaped(row.source), error, escaped(message)))

        for row in raw.rows:
            values = dict(row.values or {})
            base = ids.base(values, files, row.label)
            if row.values is None:
                reject(ids.assign(base), row, "MalformedRow", row.error)
            elif problem := check.problem(values):
                reject(ids.assign(base), row, *problem)
            elif ids.is_duplicate(values):
                # Not the next `#n`: a repetition must not rename the rows below it, whose ids key their randomness.
                reject(f"{base}#{row.label}", row, DUPLICATE, f"repeats the row of {base}")
            else:
                yield ids.assign(base), values

    columns = RowColumns(names, frozenset(files), frozenset(texts))
    table = columns.table(accepted())
    return Metadata(table, columns, rejected, len(raw.rows))
