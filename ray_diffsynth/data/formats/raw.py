"""Rows as a metadata file holds them, and how a reader gets at the file's content.

Nothing is judged here but form: a row that cannot be read is passed on with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_diffsynth import storage
from ray_diffsynth.data.placeholders import HEAD, wrong_content
from ray_diffsynth.data.text import TextError, decode_text
from ray_diffsynth.errors import UserError


class DatasetError(UserError):
    """A dataset that cannot be used at all."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row: `number` counts rows from 1, `source` says where it stands; `values` or else the `error` is set.

    `file`: of which of several metadata files it is, each of which counts its own rows.
    """

    number: int
    source: str
    values: Mapping[str, Any] | None
    error: str = ""
    file: str = ""

    @property
    def label(self) -> str:
        """What it is called where it names no file."""
        return f"{self.file}#row-{self.number}" if self.file else f"row-{self.number}"


@dataclass(frozen=True)
class RawTable:
    """All rows in order, and every column in order of appearance.

    `null_words`: the format has no null, but words that stand for it. `absent_text` says what a null text means.
    """

    columns: tuple[str, ...]
    rows: tuple[RawRow, ...]
    null_words: bool = False
    absent_text: str = "is null; write an empty text if that is meant"


def read_file(path: str) -> bytes:
    """The whole metadata file. Raises DatasetError."""
    try:
        return storage.read_bytes(path)
    except FileNotFoundError as error:
        raise DatasetError(f"the metadata file {path} does not exist; check --dataset_metadata_path") from error
    except OSError as error:
        raise DatasetError(f"the metadata file {path} cannot be read: {error}") from error


def text_of(path: str, data: bytes) -> str:
    """The text of a metadata file with this content. Raises DatasetError."""
    try:
        return decode_text(path, data)
    except TextError as error:
        raise DatasetError(f"{path} {error}") from error


def columns_of(rows: Sequence[RawRow]) -> tuple[str, ...]:
    """Every column of the rows, in order of appearance."""
    return tuple(dict.fromkeys(name for row in rows for name in row.values or ()))


def what_it_is(path: str) -> str | None:
    """What a file that cannot be read as what its name says is instead, by its beginning; None if unknown."""
    try:
        with storage.open_input(path, block_size=HEAD) as file:
            return wrong_content(file.read(HEAD))
    except OSError:
        return None
