"""Warnings about the data: what happened to samples that are used all the same, counted by kind.

Whoever finds it (a decoder, a unit, a reader of metadata) calls `warn`. The innermost `collecting` collects it, and its
result travels to the driver, which prints `lines` once and writes `to_json` into report.json.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.errors import UserError, did_you_mean
from ray_diffsynth.printable import printable

logger = logging.getLogger(__name__)

DESCRIPTIONS: Mapping[str, str] = {
    "caption_cut": "captions longer than the text encoder reads, and cut",
    "file_form": "files of another form than is usual, read as they are meant",
    "file_left_out": "files that look like part of the dataset, and were left out",
    "caption_alone": "caption files without an image, left out",
    "row_left_out": "rows that cannot be used, left out",
    "sample_replaced": "samples that cannot be decoded, in whose place another of their size was trained on",
    "batch_halved": "batches that did not fit into memory, and were halved",
    "enlarged": "images or videos smaller than their size, and enlarged",
    "cropped": "images or videos of another shape than their size, and more than a tenth cut away",
    "left_aside": "files of which something could not be used",
}
"""Kind of warning -> its description in the report. A new kind is a line here."""

MAX_SHOWN = 3
"""Samples of a kind that a printed line names."""
MAX_LISTED = 10_000
"""Samples of a kind that report.json lists; the count is of all."""
_WIDTH = 120
"""Characters of a sample id, or of a detail, that a line shows."""


class UnknownWarningError(UserError, ValueError):
    """A kind of warning that `DESCRIPTIONS` does not have."""


@dataclass(frozen=True, slots=True)
class DataWarning:
    """One thing that happened to one sample: its kind (of `DESCRIPTIONS`), the sample's id, and with which numbers.

    `sample_id` is the path of a file where it happened to no sample, and "" where it is no single one's. Raises
    UnknownWarningError.
    """

    kind: str
    sample_id: str
    detail: str

    def __post_init__(self) -> None:
        if self.kind not in DESCRIPTIONS:
            raise UnknownWarningError(
                f"there is no warning of the kind {self.kind!r}; {did_you_mean(self.kind, DESCRIPTIONS)}"
            )


class DataWarnings:
    """All that happened, each thing once: the same kind, sample and detail again is the same warning."""

    def __init__(self, warnings: Iterable[DataWarning] = ()) -> None:
        self._found: dict[str, dict[tuple[str, str], None]] = {}
        for warning in warnings:
            self._take(warning)

    def add(self, kind: str, sample_id: str, detail: str) -> None:
        """Raises UnknownWarningError."""
        self._take(DataWarning(kind, sample_id, detail))

    def merge(self, other: Iterable[DataWarning]) -> None:
        """Take in all of another collection."""
        for warning in other:
            self._take(warning)

    def lines(self) -> list[str]:
        """One line a kind: what happened, how often, and the first samples."""
        return [self._line(kind, list(found)) for kind, found in self._sorted()]

    def to_json(self) -> dict[str, Any]:
        """Kind -> {"what", "count", "samples": [{"sample_id", "detail"}, …]}; of the samples the first `MAX_LISTED`."""
        return {
            kind: {
                "what": DESCRIPTIONS[kind],
                "count": len(found),
                "samples": [
                    {"sample_id": printable(name), "detail": printable(detail)}
                    for name, detail in list(found)[:MAX_LISTED]
                ],
            }
            for kind, found in self._sorted()
        }

    def rows(self) -> list[list[str]]:
        """For JSON, on the way to another process."""
        return [[warning.kind, warning.sample_id, warning.detail] for warning in self]

    @classmethod
    def of(cls, rows: Iterable[Sequence[str]]) -> DataWarnings:
        """The inverse of `rows`; a kind that this version does not know is left out."""
        return cls(DataWarning(kind, sample_id, detail) for kind, sample_id, detail in rows if kind in DESCRIPTIONS)

    def __iter__(self) -> Iterator[DataWarning]:
        for kind, found in self._sorted():
            for sample_id, detail in found:
                yield DataWarning(kind, sample_id, detail)

    def __len__(self) -> int:
        return sum(len(found) for found in self._found.values())

    def _take(self, warning: DataWarning) -> None:
        self._found.setdefault(warning.kind, {})[warning.sample_id, warning.detail] = None

    def _sorted(self) -> list[tuple[str, dict[tuple[str, str], None]]]:
        """By the order of the table, whatever came first."""
        return [(kind, self._found[kind]) for kind in DESCRIPTIONS if kind in self._found]

    def _line(self, kind: str, found: list[tuple[str, str]]) -> str:
        shown = [
            _short(f"{name}: {detail}" if name and detail else name or detail) for name, detail in found[:MAX_SHOWN]
        ]
        more = f"; … and {len(found) - MAX_SHOWN} more, see report.json" if len(found) > MAX_SHOWN else ""
        return f"{DESCRIPTIONS[kind]}: {len(found)} ({'; '.join(shown)}{more})"


def _short(text: str) -> str:
    return printable(text if len(text) <= _WIDTH else f"{text[: _WIDTH - 40]}…{text[-39:]}")


_current: ContextVar[DataWarnings | None] = ContextVar("data warnings", default=None)


@contextmanager
def collecting() -> Iterator[DataWarnings]:
    """Collects the warnings that this thread gives within it: they go into the result, and nowhere else."""
    found = DataWarnings()
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)


@contextmanager
def about(sample_id: str) -> Iterator[None]:
    """The warnings that this thread gives within it are of this sample, whatever name they were given for it."""
    with collecting() as found:
        yield
    for warning in found:
        warn(warning.kind, sample_id, warning.detail)


def warn(kind: str, sample_id: str, detail: str) -> None:
    """Warn of what happened to a sample: to the innermost `collecting`, or without one to the log.

    A caller that does not know the sample's id gives its file or its caption instead: `about`, or the collector,
    replaces it by the id. Raises UnknownWarningError.
    """
    warning = DataWarning(kind, sample_id, detail)
    found = _current.get()
    if found is not None:
        found.merge((warning,))
    else:
        logger.warning("%s", DataWarnings((warning,)).lines()[0])
