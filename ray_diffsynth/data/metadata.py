"""The rows of a dataset with their sample ids: what can be used, and what cannot, with the reason."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_diffsynth import storage
from ray_diffsynth.data.folder import read_folder
from ray_diffsynth.data.formats import READERS, DatasetError, RawRow, RawTable, separator_advice
from ray_diffsynth.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from ray_diffsynth.data.warnings import warn
from ray_diffsynth.data.webdataset import read_tars
from ray_diffsynth.errors import did_you_mean

__all__ = ["DatasetError", "Metadata", "Quarantined", "read_metadata", "resolve_file"]

DUPLICATE = "DuplicateRow"
"""Error class of an exact repetition of another row."""
_NULL_WORDS = ("nan", "null", "none", "<na>", "n/a", "#n/a")
"""What pandas, SQL, Python and spreadsheets write for nothing, in lower case."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A sample that is left out: its id, where it comes from, the class of the error and a message."""

    sample_id: str
    source: str
    error: str
    message: str


@dataclass(frozen=True)
class Metadata:
    """`table`: column `sample_id` (string), then the file's columns, in its order. total = rows + rejected."""

    table: pa.Table
    rejected: list[Quarantined]
    total: int


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
    if "sample_id" in raw.columns:
        raise DatasetError(f"{path}: the column name 'sample_id' is taken by ray_diffsynth; rename it")


def _storable(text: str) -> bool:
    """Whether a text is made of whole characters, as Arrow and UTF-8 want it."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    """The text with what is no character written as an escape."""
    return text.encode(errors="backslashreplace").decode()


def _strings(value: Any) -> Iterable[str]:
    """Every text in a value, names within objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(name)
            yield from _strings(item)


def _broken_text(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """(error class, message) of the first value with half a character in it."""
    for column, value in values.items():
        for text in (column, *_strings(value)):
            if not _storable(text):
                name, shown = _printable(column), _printable(text)
                shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
                why = "is not whole characters (a file name that is not UTF-8, or half a surrogate pair)"
                return "InvalidValue", f"the column {name!r} holds '{shown}', which {why}; write it as UTF-8"
    return None


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _paths(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _problem(
    values: Mapping[str, Any], files: Sequence[str], texts: Sequence[str], required: Sequence[str], absent_text: str
) -> tuple[str, str] | None:
    """(error class, message) of the first thing wrong with a row."""
    for column in (c for c in files if c in required or not _is_missing(values.get(c))):
        value = values.get(column)
        if _is_missing(value) or not _paths(value) or any(_is_missing(p) or p == "" for p in _paths(value)):
            return "MissingValue", f"the column {column!r} names no file"
        if wrong := [p for p in _paths(value) if not isinstance(p, str)]:
            return "InvalidValue", f"the column {column!r} holds {type(wrong[0]).__name__}, not the path of a file"
    for column in texts:
        value = values.get(column)
        if _is_missing(value):
            if column in required:
                return "MissingValue", f"the column {column!r} {absent_text}"
        elif not isinstance(value, str):
            return "InvalidValue", f"the column {column!r} holds {type(value).__name__}, not a text"
    for column in required:
        if column not in files and column not in texts and _is_missing(values.get(column)):
            return "MissingValue", f"the column {column!r} is null"
    return None


def _parse(values: dict[str, Any], parsers: Mapping[str, Callable[[Any], Any]]) -> tuple[str, str] | None:
    """Read the values by their parsers, in place; (error class, message) of the first that cannot be read."""
    for column in (name for name in parsers if name in values):
        try:
            values[column] = parsers[column](values[column])
        except (ValueError, TypeError) as error:
            return "InvalidValue", f"the column {column!r} cannot be used: {error}"
    return None


def _array(values: list[Any], is_file: bool) -> pa.Array:
    if is_file and any(isinstance(value, list) for value in values):
        return pa.array([None if value is None else _paths(value) for value in values], pa.list_(pa.string()))
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        # A column whose rows differ in type has no Arrow type; its JSON text keeps all that was written.
        texts = [None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in values]
        return pa.array(texts, pa.string())


class _Ids:
    """Sample ids: the path as written, `#2`, `#3` … for further rows of the same file."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.rows: set[bytes] = set()
        self.count: dict[str, int] = {}

    def base(self, row: RawRow, files: Sequence[str]) -> str:
        for column in files:
            paths = _paths((row.values or {}).get(column))
            if paths and isinstance(paths[0], str) and paths[0]:
                return _printable(storage.without_place(paths[0]))
        return f"row-{row.number}"

    def assign(self, base: str) -> str:
        name = base
        while name in self.taken:
            self.count[base] = self.count.get(base, 1) + 1
            name = f"{base}#{self.count[base]}"
        self.taken.add(name)
        return name

    def is_duplicate(self, values: Mapping[str, Any]) -> bool:
        text = json.dumps(values, sort_keys=True, default=repr)
        # Not the text: of a large dataset that would be held twice.
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        seen = digest in self.rows
        self.rows.add(digest)
        return seen


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

    `parsers`: column -> what makes its value of the one that stands in the file (a csv holds texts only); when it
    raises ValueError, the row is rejected with that message.

    Raises DatasetError when nothing can be read: no file, no rows, no such column.
    """
    path, raw = _read(base_path, metadata_path, file_columns, text_columns)
    _check_columns(path, raw, required)
    files = [column for column in file_columns if column in raw.columns]
    texts = [column for column in text_columns if column in raw.columns]
    ids = _Ids()
    accepted: list[tuple[str, Mapping[str, Any]]] = []
    rejected: list[Quarantined] = []

    def reject(sample_id: str, row: RawRow, error: str, message: str) -> None:
        rejected.append(Quarantined(sample_id, _printable(row.source), error, _printable(message)))

    for row in raw.rows:
        values = dict(row.values or {})
        if raw.null_words:
            values |= {c: None for c in texts if str(values.get(c)).strip().lower() in _NULL_WORDS}
        base = ids.base(row, files)
        if row.values is None:
            reject(ids.assign(base), row, "MalformedRow", row.error)
        elif problem := (
            _problem(values, files, texts, required, raw.absent_text)
            or _parse(values, parsers or {})
            or _broken_text(values)
        ):
            reject(ids.assign(base), row, *problem)
        elif ids.is_duplicate(values):
            # Not the next `#n`: a repetition must not rename the rows below it, whose ids key their randomness.
            reject(f"{base}#row-{row.number}", row, DUPLICATE, f"repeats the row of {base}")
        else:
            accepted.append((ids.assign(base), values))
    names = [name for name in raw.columns if _storable(name)]  # another one is in rejected rows only
    columns = [pa.array([sample_id for sample_id, _ in accepted], pa.string())]
    columns += [_array([values.get(name) for _, values in accepted], name in files) for name in names]
    table = pa.Table.from_arrays(columns, names=["sample_id", *names])
    return Metadata(table, rejected, len(raw.rows))
