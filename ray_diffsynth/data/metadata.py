"""The rows of a dataset with their sample ids: what can be used, and what cannot, with the reason."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_diffsynth import storage
from ray_diffsynth.data.folder import read_folder
from ray_diffsynth.data.formats import READERS, DatasetError, RawRow, RawTable, separator_advice
from ray_diffsynth.data.row_checks import NULL_WORDS, RowCheck, escaped
from ray_diffsynth.data.rows import SAMPLE_ID, RowColumns
from ray_diffsynth.data.sample_ids import SampleIds
from ray_diffsynth.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from ray_diffsynth.data.warnings import warn
from ray_diffsynth.data.webdataset import read_tars
from ray_diffsynth.errors import did_you_mean

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


def _find(base_path: str, metadata_path: str | None) -> str | None:
    """The metadata file; None for a folder of images."""
    if metadata_path is not None:
        inside = storage.join(base_path, metadata_path)
        # Relative to the working directory as in DiffSynth-Studio, else to the dataset.
        return inside if not storage.exists(metadata_path) and storage.exists(inside) else metadata_path
    if not storage.exists(base_path):
        raise DatasetError(f"the dataset folder {base_path} does not exist; check --dataset_base_path")
    found = [path for suffix in READERS if storage.exists(path := storage.join(base_path, f"metadata{suffix}"))]
    if len(found) > 1:
        raise DatasetError(
            f"{base_path} has several metadata files ({', '.join(found)}); name one with --dataset_metadata_path"
        )
    return found[0] if found else None


def _tars(base_path: str, metadata_path: str | None, path: str | None) -> list[str]:
    """WebDataset tars, relative to `base_path` where they lie in it: the one that is named, or those of the folder."""
    if path is not None:
        inside = metadata_path is not None and path == storage.join(base_path, metadata_path)
        found = metadata_path if inside and metadata_path is not None else storage.absolute(path)
        return [found] if path.lower().endswith(".tar") and not storage.is_folder(path) else []
    if base_path.lower().endswith(".tar") and not storage.is_folder(base_path):
        return [storage.absolute(base_path)]
    names = storage.list_files(base_path)
    tars = [name for name in names if name.lower().endswith(".tar")]
    if tars:
        loose = [name for name in names if name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))]
        for name in loose:
            warn("file_left_out", name, "it lies beside tars, which are the dataset; put it in a folder of its own")
    return tars


def _read(
    base_path: str, metadata_path: str | None, file_columns: Sequence[str], text_columns: Sequence[str]
) -> tuple[str, RawTable]:
    path = _find(base_path, metadata_path)
    file_column = "image" if "image" in file_columns or not file_columns else file_columns[0]
    text_column = "prompt" if "prompt" in text_columns or not text_columns else text_columns[0]
    if tars := _tars(base_path, metadata_path, path):
        return path or base_path, read_tars(base_path, tars, file_column, text_column)
    if path is None:
        return base_path, read_folder(base_path, file_column, text_column)
    suffix = os.path.splitext(path)[1].lower()
    if storage.exists(path) and (suffix not in READERS or storage.is_folder(path)):
        raise DatasetError(f"{path} is not a metadata file; supported are {', '.join(READERS)}")
    return path, READERS.get(suffix, READERS[".csv"])(path)


def _check_columns(path: str, raw: RawTable, required: Sequence[str]) -> None:
    if not raw.rows:
        raise DatasetError(f"{path} has no rows; write one for each sample, below the names of the columns")
    if all(row.values is None for row in raw.rows):
        raise DatasetError(f"{path} has no readable row; the first: {raw.rows[0].error}")
    for column in required:
        if column not in raw.columns:
            raise DatasetError(
                f"{path} has no column {column!r}; its columns are {', '.join(raw.columns)}; "
                f"{separator_advice(raw.columns)}rename one, or choose "
                f"others with --data_file_keys; {did_you_mean(column, raw.columns)}"
            )
    if SAMPLE_ID in raw.columns:
        raise DatasetError(f"{path}: the column name 'sample_id' is taken by ray_diffsynth; rename it")


def read_metadata(
    base_path: str,
    metadata_path: str | None = None,
    *,
    file_columns: Sequence[str] = ("image",),
    text_columns: Sequence[str] = ("prompt",),
    required: Sequence[str] = ("image", "prompt"),
    parsers: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Metadata:
    """Read a dataset's metadata and give every row an id.

    Without `metadata_path` it is `metadata.{csv,json,jsonl,parquet}` in `base_path`, else the folder's images with
    `.txt` captions. Rejected are rows that cannot be read (MalformedRow), that lack a required value (MissingValue) or
    have it in another type (InvalidValue), and exact repetitions (DuplicateRow). An empty caption is a caption.

    Only the columns that are named travel: files, texts and what is required.

    `parsers`: column -> what makes its value of the one that stands in the file (a csv holds texts only); when it
    raises ValueError, the row is rejected with that message.

    Raises DatasetError when nothing can be read: no file, no rows, no such column.
    """
    path, raw = _read(base_path, metadata_path, file_columns, text_columns)
    _check_columns(path, raw, required)
    wanted = {*file_columns, *text_columns, *required}
    names = tuple(name for name in raw.columns if name in wanted)
    files = [column for column in file_columns if column in names]
    texts = [column for column in text_columns if column in names]
    check = RowCheck(files, texts, required, names, raw.absent_text, parsers or {})
    rejected: list[Quarantined] = []

    def accepted() -> Iterator[tuple[str, Mapping[str, Any]]]:
        ids = SampleIds()

        def reject(sample_id: str, row: RawRow, error: str, message: str) -> None:
            rejected.append(Quarantined(sample_id, escaped(row.source), error, escaped(message)))

        for row in raw.rows:
            values = dict(row.values or {})
            if raw.null_words:
                values |= {c: None for c in texts if str(values.get(c)).strip().lower() in NULL_WORDS}
            base = ids.base(values, files, f"row-{row.number}")
            if row.values is None:
                reject(ids.assign(base), row, "MalformedRow", row.error)
            elif problem := check.problem(values):
                reject(ids.assign(base), row, *problem)
            elif ids.is_duplicate(values):
                # Not the next `#n`: a repetition must not rename the rows below it, whose ids key their randomness.
                reject(f"{base}#row-{row.number}", row, DUPLICATE, f"repeats the row of {base}")
            else:
                yield ids.assign(base), values

    columns = RowColumns(names, frozenset(files), frozenset(texts))
    table = columns.table(accepted())
    return Metadata(table, columns, rejected, len(raw.rows))
