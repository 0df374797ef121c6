"""Rows of JSON, as one list or one object a line."""

from __future__ import annotations

import json
import re
from typing import Any

from ray_diffsynth.data.formats.raw import DatasetError, RawRow, RawTable, columns_of, read_file, text_of


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
    content = text_of(path, read_file(path))
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
    return RawTable(columns_of(rows), tuple(rows))


def read_json(path: str) -> RawTable:
    """A list of objects, or an object whose `data` is such a list."""
    try:
        content = json.loads(text_of(path, read_file(path)), object_pairs_hook=_object)
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
    return RawTable(columns_of(rows), tuple(rows))
