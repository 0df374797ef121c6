"""What the columns of a dataset are called in its files: as the pipeline calls them, by an option, or by convention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray_diffsynth.data.formats import DatasetError, RawTable
from ray_diffsynth.data.formats.delimited import separator_advice
from ray_diffsynth.data.warnings import warn
from ray_diffsynth.errors import did_you_mean

FILE_NAME, TEXT = "file_name", "text"
"""What Hugging Face's image folders call the file of a row and its caption."""


@dataclass(frozen=True)
class ColumnNames:
    """The columns that are used, and what they are called in the files.

    `files`, `texts`: the columns of files and captions, the target and the caption first. `given`: column -> its name
    in the files, as an option says.
    """

    files: tuple[str, ...] = ("image",)
    texts: tuple[str, ...] = ("prompt",)
    given: Mapping[str, str] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The column of what is trained on."""
        return "image" if "image" in self.files or not self.files else self.files[0]

    @property
    def caption(self) -> str:
        """The column of its captions."""
        return "prompt" if "prompt" in self.texts or not self.texts else self.texts[0]

    def conventional(self, column: str) -> Iterator[str]:
        """Names by which a column is known without an option."""
        if column == self.target:
            yield FILE_NAME
        if column in self.files:
            yield from (f"{column}_{FILE_NAME}", f"{column}_{FILE_NAME}s")
        if column == self.caption:
            yield TEXT

    def sources(self, columns: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
        """Column -> its name among `columns`, of those that are called otherwise."""
        found = {column: name for column, name in self.given.items() if name in columns}
        for column in wanted:
            if column not in columns and column not in self.given:
                known = next((name for name in self.conventional(column) if name in columns), None)
                found |= {} if known is None else {column: known}
        return found

    def renamed(self, path: str, raw: RawTable, wanted: Sequence[str]) -> RawTable:
        """The table with its columns called as they are used. What is recognised by convention is told in a line."""
        sources = self.sources(raw.columns, wanted)
        if known := {column: name for column, name in sources.items() if column not in self.given}:
            pairs = ", ".join(f"{name} as {column}" for column, name in known.items())
            warn("file_form", path, f"its columns are read by the names of Hugging Face's image folders: {pairs}")
        replaced = {*sources, *self.given}
        if not replaced:
            return raw

        def values(row: Mapping[str, Any]) -> dict[str, Any]:
            kept = {name: value for name, value in row.items() if name not in replaced}
            return kept | {column: row[name] for column, name in sources.items() if name in row}

        names = tuple(dict.fromkeys([*(name for name in raw.columns if name not in replaced), *sources]))
        rows = tuple(row if row.values is None else replace(row, values=values(row.values)) for row in raw.rows)
        return replace(raw, columns=names, rows=rows)

    def shown(self, column: str) -> str:
        """The column as messages name it: as the files call it."""
        return self.given.get(column, column)

    def missing(self, path: str, column: str, columns: Sequence[str]) -> DatasetError:
        """That a column is not there: the columns that are, and the option that names another."""
        there = f"its columns are {', '.join(columns)}; {separator_advice(columns)}"
        if column in self.given:
            name = self.given[column]
            option = self.option(column)
            return DatasetError(
                f"{path} has no column {name!r}, which {option} names; {there}{did_you_mean(name, columns)}"
            )
        example = self.option(column, "NAME")
        return DatasetError(
            f"{path} has no column {column!r}; {there}name the one that you have by {example}, or rename it; "
            f"{did_you_mean(column, columns)}"
        )

    def option(self, column: str, name: str = "") -> str:
        """The option that says what a column is called."""
        flag = {self.target: "--image_column", self.caption: "--caption_column"}.get(column)
        if flag is not None:
            return f"{flag} {name}".strip()
        return f'--column_map \'{{"{column}": "{name}"}}\'' if name else "--column_map"
