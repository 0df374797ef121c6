"""Rows of a metadata file as it holds them: csv, json, jsonl, parquet, or a folder of pictures with captions in .txt.

Nothing is judged here but form: a row that cannot be read is passed on with the reason.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_diffsynth.data import storage
from ray_diffsynth.data.parquet import open_parquet
from ray_diffsynth.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
READ_THREADS = 16
"""Captions, or tars, that are read at the same time."""
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".gif")


class DatasetError(UserError):
    """A dataset that cannot be used at all."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row: `number` counts rows from 1, `source` says where it stands; `values` or else the `error` is set."""

    number: int
    source: str
    values: Mapping[str, Any] | None
    error: str = ""


@dataclass(frozen=True)
class RawTable:
    """All rows in order, and every column in order of appearance.

    `null_words`: the format has no null, but words that stand for it. `absent_text` says what a null text means.
    """

    columns: tuple[str, ...]
    rows: tuple[RawRow, ...]
    null_words: bool = False
    absent_text: str = "is null; write an empty text if that is meant"


def _read(path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError as error:
        raise DatasetError(f"the metadata file {path} does not exist; check --dataset_metadata_path") from error
    except OSError as error:
        raise DatasetError(f"the metadata file {path} cannot be read: {error}") from error


def _text(path: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DatasetError(f"{path} is not UTF-8 (line {line}, byte {error.start}); save it as UTF-8") from error


def _columns(rows: list[RawRow]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row.values or ()))


def _csv_records(path: str, text: str) -> Iterator[tuple[int, list[str] | None, str]]:
    """(first line, fields, error) of every record that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > first or "end of data" in str(error):
                raise DatasetError(
                    f"{path}, line {first}: a quote is opened here and not closed properly up to line "
                    f"{reader.line_num} ({error}); close it, or double a quote that is part of the text"
                ) from error
            yield first, None, str(error)
            continue
        if fields:
            yield first, fields, ""


def read_csv(path: str) -> RawTable:
    """Comma-separated, quoted with `"`, first record the header; UTF-8 with or without BOM."""
    records = _csv_records(path, _text(path, _read(path)))
    _, header, error = next(records, (0, [], ""))
    if not header:
        raise DatasetError(f"{path} has no header line" + (f" ({error})" if error else ""))
    columns = [name.strip() for name in header]
    if repeated := sorted({name for name in columns if columns.count(name) > 1}):
        raise DatasetError(f"{path}: the column {repeated[0]!r} appears twice in the header; rename one")
    rows = []
    for number, (line, fields, error) in enumerate(records, 1):
        values = None
        if fields is not None and len(fields) == len(columns):
            values = dict(zip(columns, fields, strict=True))
        elif fields is not None:
            advice = "; quote a text that holds a comma" if len(fields) > len(columns) else ""
            error = f"{len(fields)} fields where the header has {len(columns)}{advice}"
        rows.append(RawRow(number, f"{path}:{line}", values, f"line {line}: {error}" if error else ""))
    return RawTable(tuple(columns), tuple(rows), null_words=True)


def _object_row(number: int, source: str, where: str, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(number, source, value)
    return RawRow(number, source, None, f"{where} is {type(value).__name__}, not an object with columns")


def read_jsonl(path: str) -> RawTable:
    """One JSON object a line; blank lines are skipped."""
    rows: list[RawRow] = []
    # Not splitlines: it also cuts at characters such as U+2028 that JSON strings may hold.
    for line, text in enumerate(_text(path, _read(path)).split("\n"), 1):
        if not text.strip():
            continue
        number, source = len(rows) + 1, f"{path}:{line}"
        try:
            rows.append(_object_row(number, source, f"line {line}", json.loads(text)))
        except (json.JSONDecodeError, RecursionError) as error:
            rows.append(RawRow(number, source, None, f"line {line} is not JSON: {error}"))
    return RawTable(_columns(rows), tuple(rows))


def read_json(path: str) -> RawTable:
    """A list of objects, or an object whose `data` is such a list."""
    try:
        content = json.loads(_text(path, _read(path)))
    except json.JSONDecodeError as error:
        advice = "; if it holds one object a line, name it .jsonl" if error.msg == "Extra data" else ""
        raise DatasetError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}{advice}") from error
    except RecursionError as error:
        raise DatasetError(f"{path} is nested too deeply to read; it must be a list of objects") from error
    entries = content.get("data") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        kind = type(content).__name__
        raise DatasetError(f'{path} must hold a list of objects, or {{"data": [...]}}; it holds {kind}')
    rows = [_object_row(n, f"{path}#{n}", f"entry {n}", entry) for n, entry in enumerate(entries, 1)]
    return RawTable(_columns(rows), tuple(rows))


def read_parquet(path: str) -> RawTable:
    """One row a sample, of plain columns. Raises ColumnError for an extension type, before any value is read."""
    try:
        with storage.open_input(path) as file, open_parquet(file, path) as parquet:
            columns: list[str] = parquet.schema_arrow.names
            if repeated := sorted({name for name in columns if columns.count(name) > 1}):
                raise DatasetError(f"{path}: the column {repeated[0]!r} appears twice; rename one")
            values = parquet.read().to_pylist()
    except FileNotFoundError as error:
        raise DatasetError(f"the metadata file {path} does not exist; check --dataset_metadata_path") from error
    except UserError:
        raise
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        # ValueError: bytes that are no text, a date that Python has none for
        raise DatasetError(f"{path} is not a readable Parquet file: {error}; write it again") from error
    rows = (RawRow(n, f"{path}#{n}", row) for n, row in enumerate(values, 1))
    return RawTable(tuple(columns), tuple(rows))


def read_folder(folder: str, file_column: str, text_column: str) -> RawTable:
    """Every picture below `folder` in order of its path, with the text of the `.txt` file of the same stem.

    For the column "video", the videos too.
    """
    suffixes = (*IMAGE_SUFFIXES, *(VIDEO_SUFFIXES if file_column == "video" else ()))
    names = storage.list_files(folder, suffix=(*suffixes, ".txt"), recursive=True)
    captions = {name[: -len(".txt")]: name for name in names if name.lower().endswith(".txt")}

    def row(number: int, name: str) -> RawRow:
        values: dict[str, Any] = {file_column: name}
        error = ""
        if caption := captions.get(name.rpartition(".")[0]):
            try:
                values[text_column] = _text(caption, storage.read_bytes(storage.join(folder, caption))).strip()
            except (DatasetError, OSError) as problem:
                error = f"the caption file cannot be read: {problem}"
        return RawRow(number, storage.join(folder, name), None if error else values, error)

    pictures = [name for name in names if not name.lower().endswith(".txt")]
    with ThreadPoolExecutor(READ_THREADS) as pool:  # a request each, on an object store
        rows = list(pool.map(row, range(1, len(pictures) + 1), pictures))
    if not rows:
        raise DatasetError(
            f"{folder} has neither a metadata file ({', '.join('metadata' + s for s in READERS)}) nor pictures "
            f"({', '.join(dict.fromkeys(suffixes))}); check --dataset_base_path, or name the file with "
            "--dataset_metadata_path"
        )
    absent = "is absent: there is no .txt file of the same stem beside the picture"
    return RawTable((file_column, text_column), tuple(rows), absent_text=absent)


READERS: Mapping[str, Callable[[str], RawTable]] = {
    ".csv": read_csv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
