"""What is wrong with a row of metadata, looked at by itself: (error class, message) of the first thing, or None."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_diffsynth.data.rows import paths_of, to_json

NULL_WORDS = ("nan", "null", "none", "<na>", "n/a", "#n/a")
"""What pandas, SQL, Python and spreadsheets write for nothing, in lower case."""

Problem = tuple[str, str]


def is_whole_text(text: str) -> bool:
    """Whether a text is made of whole characters, as Arrow and UTF-8 want it."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(text: str) -> str:
    """The text with what is no character written as an escape."""
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class RowCheck:
    """What is wanted of a row: columns of files, of texts, those that must have a value, and what reads values.

    `absent_text` says what it means that a required text is null.
    """

    files: Sequence[str]
    texts: Sequence[str]
    required: Sequence[str]
    used: Sequence[str]
    absent_text: str
    parsers: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    shown: Callable[[str], str] = str
    """What messages call a column: its name in the file."""

    def problem(self, values: dict[str, Any]) -> Problem | None:
        """What is wrong with a row, whose values are read by their parsers in place."""
        return self._missing(values) or self._parse(values) or broken_text(values) or self._no_json(values)

    def _missing(self, values: Mapping[str, Any]) -> Problem | None:
        for column in (c for c in self.files if c in self.required or not _is_missing(values.get(c))):
            value = values.get(column)
            if _is_missing(value) or not paths_of(value) or any(_is_missing(p) or p == "" for p in paths_of(value)):
                return "MissingValue", f"the column {self.shown(column)!r} names no file"
            if wrong := [p for p in paths_of(value) if not isinstance(p, str)]:
                return (
                    "InvalidValue",
                    f"the column {self.shown(column)!r} holds {type(wrong[0]).__name__}, not the path of a file",
                )
        for column in self.texts:
            value = values.get(column)
            if _is_missing(value):
                if column in self.required:
                    return "MissingValue", f"the column {self.shown(column)!r} {self.absent_text}"
            elif not isinstance(value, str):
                return "InvalidValue", f"the column {self.shown(column)!r} holds {type(value).__name__}, not a text"
        for column in self.required:
            if column not in self.files and column not in self.texts and _is_missing(values.get(column)):
                return "MissingValue", f"the column {self.shown(column)!r} is null"
        return None

    def _parse(self, values: dict[str, Any]) -> Problem | None:
        for column in (name for name in self.parsers if name in values):
            try:
                values[column] = self.parsers[column](values[column])
            except (ValueError, TypeError) as error:
                return "InvalidValue", f"the column {self.shown(column)!r} cannot be used: {error}"
        return self._missing(values) if self.parsers else None

    def _no_json(self, values: Mapping[str, Any]) -> Problem | None:
        for column in self.used:
            if column in self.files or column in self.texts:
                continue
            try:
                to_json(values.get(column))
            except (TypeError, ValueError, RecursionError) as error:
                kind = type(values[column]).__name__
                return "InvalidValue", (
                    f"the column {self.shown(column)!r} holds {kind}, which is no value of JSON ({error}); "
                    "write it as a text, a number, or a list or object of these"
                )
        return None


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


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


def broken_text(values: Mapping[str, Any]) -> Problem | None:
    """The first value with half a character in it, of any column."""
    for column, value in values.items():
        for text in (column, *_strings(value)):
            if not is_whole_text(text):
                name, shown = escaped(column), escaped(text)
                shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
                why = "is not whole characters (a file name that is not UTF-8, or half a surrogate pair)"
                return "InvalidValue", f"the column {name!r} holds '{shown}', which {why}; write it as UTF-8"
    return None
