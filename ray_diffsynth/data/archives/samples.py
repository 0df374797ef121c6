"""Members of an archive as samples: those of one stem are one sample, by the rule of WebDataset."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ray_diffsynth.data.formats import DatasetError, RawRow, RawTable
from ray_diffsynth.data.suffixes import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES, VIDEO_SUFFIXES, why_unreadable
from ray_diffsynth.data.text import decode_text
from ray_diffsynth.data.warnings import warn

MAX_TEXT_BYTES = 16 << 20
"""Largest caption or JSON that is read of an archive."""
_MEDIA = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
_OWN = re.compile(r"__[^/]*__($|/)")
"""Beginnings of names that WebDataset keeps for itself, such as `__meta__/index.json`: no samples."""


class ArchiveSamples:
    """The samples of one archive. `samples`: stem -> (values, error); `problem`: what ended the reading too early."""

    def __init__(self, archive: str, file_column: str, text_column: str) -> None:
        self.archive = archive
        self.file_column = file_column
        self.text_column = text_column
        self.samples: dict[str, tuple[dict[str, Any], str]] = {}
        self.problem = ""

    def add(self, name: str, place: str, size: int, read: Callable[[], bytes]) -> None:
        """Take in a member: its name, its place, its bytes, and what reads it where it is a text.

        `<stem>.<image or video suffix>` is the file, `<stem>.txt` the caption, the values of `<stem>.json` are columns
        of their names, `<stem>.<column>.<suffix>` is a further file of that column. What is none of these is left out.
        """
        folder, base = posixpath.split(name)
        if base.startswith(".") or _OWN.match(name):
            return
        if name.lower().endswith(UNREADABLE_SUFFIXES):
            warn("file_left_out", f"{self.archive}/{name}", why_unreadable(name))
            return
        stem, _, extension = base.partition(".")
        stem = posixpath.join(folder, stem)
        values, error = self.samples.get(stem, ({}, ""))
        try:
            values |= self._values(name, extension.lower(), place, size, read)
        except (ValueError, RecursionError) as problem:
            error = f"{name}: {problem}"
        if values or error:  # else a README or the like
            self.samples[stem] = (values, error)

    def _values(self, name: str, extension: str, place: str, size: int, read: Callable[[], bytes]) -> dict[str, Any]:
        """What one member gives to its sample. Raises ValueError for a text that cannot be read."""
        column, _, suffix = extension.rpartition(".")
        if f".{suffix}" in _MEDIA:
            return {column or self.file_column: place}
        if extension not in ("txt", "json"):
            return {}
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"is a text of {size} bytes, more than the {MAX_TEXT_BYTES >> 20} MiB that are read")
        text = decode_text(name, read())
        if extension == "txt":
            return {self.text_column: text.strip()}
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"holds {type(values).__name__}, not an object with columns")
        return {key: value for key, value in values.items() if key not in (self.file_column, "sample_id")}

    def rows(self) -> Iterator[tuple[str, Mapping[str, Any] | None, str]]:
        """(where it stands, values or None, error) of each sample, and of what ended the reading too early."""
        for stem, (values, error) in self.samples.items():
            # `__meta__.json` describes the archive.
            if not _OWN.match(stem) or self.file_column in values:
                yield f"{self.archive}/{stem}", None if error else values, error
        if self.problem:
            yield self.archive, None, self.problem


def table_of(base_path: str, archives: Sequence[ArchiveSamples], kind: str, column: tuple[str, str]) -> RawTable:
    """The samples of archives as one table; `column`: those of the file and the caption. Raises DatasetError."""
    found = [row for archive in archives for row in archive.rows()]
    if not found:
        names = ", ".join(archive.archive for archive in archives)
        raise DatasetError(f"the {kind}s {names} of {base_path} hold no samples")
    columns = dict.fromkeys([*column, *(name for _, values, _ in found for name in values or ())])
    rows = (RawRow(number, *row) for number, row in enumerate(found, 1))
    absent = f"is absent: the {kind} has no .txt member of the same stem"
    return RawTable(tuple(columns), tuple(rows), absent_text=absent)
