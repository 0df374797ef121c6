"""Rows of csv and tsv."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence

from ray_diffsynth.data.formats.raw import DatasetError, RawRow, RawTable, read_file, text_of
from ray_diffsynth.data.warnings import warn

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
    text = text_of(path, read_file(path))
    separator, text = _separator(path, text)
    return _csv_table(path, text, separator)


def read_tsv(path: str) -> RawTable:
    """As `read_csv`, with tabs."""
    return _csv_table(path, text_of(path, read_file(path)), "\t")


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
