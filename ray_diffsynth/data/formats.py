"""Rows of a metadata file as it holds them: csv, tsv, json, jsonl or parquet.

Nothing is judged here but form: a row that cannot be read is passed on with the reason.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_diffsynth import storage
from ray_diffsynth.data.parquet import open_parquet
from ray_diffsynth.data.placeholders import HEAD, wrong_content
from ray_diffsynth.data.text import TextError, decode_text
from ray_diffsynth.data.warnings import warn
from ray_diffsynth.errors import UserError


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
        return decode_text(path, data)
    except TextError as error:
        raise DatasetError(f"{path} {error}") from error


def _columns(rows: list[RawRow]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row.values or ()))


SEPARATORS: Mapping[str, str] = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def _separator(path: str, text: str) -> tuple[str, str]:
    """What separates the fields of a csv, by its header, and the text below a first line `sep=;` as Excel writes it.

    Commas, unless they give one column and just one other separator gives more; then it is warned of.
    """
    first, _, rest = text.partition("\n")
    if re.fullmatch(r"sep=[,;|\t]\s*", first):
        return first[4], rest
    header = next((line for line in text.splitlines() if line.strip()), "")
    counts = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in SEPARATORS}
    others = [mark for mark, count in counts.items() if mark != "," and count > 1]
    if counts[","] > 1 or len(others) != 1:
        return ",", text
    warn("file_form", path, f"its columns are separated by {SEPARATORS[others[0]]}, read as such; commas are usual")
    return others[0], text


def _csv_records(path: str, text: str, separator: str) -> Iterator[tuple[int, list[str] | None, str]]:
    """(first line, fields, error) of every record that is not blank."""
    # Python's limit of 131072 characters is the process's; a field is as long as the text at most.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
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
            fields[0] = fields[0].removeprefix("\ufeff")  # of a file that others were appended to
            yield first, fields, ""


def read_csv(path: str) -> RawTable:
    """Comma-separated, quoted with `"`, first record the header; UTF-8 with or without a byte order mark.

    Semicolons, tabs or bars are read too where the header leaves no doubt, with a warning.
    """
    text = _text(path, _read(path))
    separator, text = _separator(path, text)
    return _csv_table(path, text, separator)


def read_tsv(path: str) -> RawTable:
    """As `read_csv`, with tabs."""
    return _csv_table(path, _text(path, _read(path)), "\t")


def _csv_table(path: str, text: str, separator: str) -> RawTable:
    records = _csv_records(path, text, separator)
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
            mark = SEPARATORS[separator].removesuffix("s")
            advice = f"; quote a text that holds a {mark}" if len(fields) > len(columns) else ""
            error = f"{len(fields)} fields where the header has {len(columns)}{advice}"
        rows.append(RawRow(number, f"{path}:{line}", values, f"line {line}: {error}" if error else ""))
    return RawTable(tuple(columns), tuple(rows), null_words=True)


def separator_advice(columns: Sequence[str]) -> str:
    """What to do about a header whose names hold what may have been meant to separate them; else nothing."""
    found = [name for mark, name in SEPARATORS.items() if mark != "," and any(mark in column for column in columns)]
    return (
        f"the header holds {found[0]}: separate the columns by commas, and quote texts that hold one; " if found else ""
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises DatasetError if a name stands in it twice, since only one of the values would be used."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise DatasetError(f"{repeated!r} stands twice in one object; leave one of them out")
    return found


def _object_row(number: int, source: str, where: str, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(number, source, value)
    return RawRow(number, source, None, f"{where} is {type(value).__name__}, not an object with columns")


def read_jsonl(path: str) -> RawTable:
    """One JSON object a line; blank lines are skipped."""
    rows: list[RawRow] = []
    content = _text(path, _read(path))
    if re.match(r"\s*\[\s*\{", content):
        raise DatasetError(f"{path} holds one JSON list, not one object a line; name it .json")
    # Not splitlines: it also cuts at characters such as U+2028 that JSON strings may hold.
    for line, text in enumerate(content.split("\n"), 1):
        text = text.removeprefix("\ufeff")  # of a file that others were appended to
        if not text.strip():
            continue
        number, source = len(rows) + 1, f"{path}:{line}"
        try:
            rows.append(_object_row(number, source, f"line {line}", json.loads(text, object_pairs_hook=_object)))
        except DatasetError as error:
            rows.append(RawRow(number, source, None, f"line {line}: {error}"))
        except (ValueError, RecursionError) as error:  # ValueError: a whole number of thousands of digits too
            rows.append(RawRow(number, source, None, f"line {line} is not JSON: {error}"))
    return RawTable(_columns(rows), tuple(rows))


def read_json(path: str) -> RawTable:
    """A list of objects, or an object whose `data` is such a list."""
    try:
        content = json.loads(_text(path, _read(path)), object_pairs_hook=_object)
    except DatasetError as error:
        raise DatasetError(f"{path} cannot be used: {error}") from error
    except json.JSONDecodeError as error:
        advice = "; if it holds one object a line, name it .jsonl" if error.msg == "Extra data" else ""
        raise DatasetError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}{advice}") from error
    except RecursionError as error:
        raise DatasetError(f"{path} is nested too deeply to read; it must be a list of objects") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise DatasetError(f"{path} cannot be read: {error}; write that number as a text in quotes") from error
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
        with storage.open_input(path) as file:
            why = wrong_content(file.read(HEAD))
        raise DatasetError(
            f"{path} is {why}" if why else f"{path} is not a readable Parquet file: {error}; write it again"
        ) from error
    rows = (RawRow(n, f"{path}#{n}", row) for n, row in enumerate(values, 1))
    return RawTable(tuple(columns), tuple(rows))


READERS: dict[str, Callable[[str], RawTable]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
"""By the ending of a file's name, in lower case. A format is one function and one line here."""
