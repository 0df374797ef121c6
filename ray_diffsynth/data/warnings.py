"""What happened to the data without making it unusable: told once, summed, with the samples that it happened to.

Whoever meets it (a decoder, a unit, a reader of metadata) calls `warn`; the nearest `collecting` takes it in, and what
it took travels with the results to the driver, which prints `lines` once and writes `to_json` into report.json.
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

WHAT: Mapping[str, str] = {
    "caption_cut": "captions longer than the text encoder reads, and cut",
    "file_form": "files of another form than is usual, read as they are meant",
    "file_left_out": "files that look like part of the dataset, and were left out",
    "caption_alone": "caption files without a picture, left out",
    "row_left_out": "rows that cannot be used, left out",
    "sample_replaced": "samples that cannot be decoded, in whose place another of their size was trained on",
    "batch_halved": "batches that did not fit into memory, and were halved",
    "enlarged": "pictures or videos smaller than their size, and enlarged",
    "cropped": "pictures or videos of another shape than their size, and more than a tenth cut away",
    "left_aside": "files of which something could not be used",
}
"""Kind -> what happened, for people. A new kind is a line here."""

SHOWN = 3
"""Samples of a kind that a line names."""
LISTED = 10_000
"""Samples of a kind that report.json lists; the count is of all."""
_WIDTH = 120
"""Characters of a sample id, or of a detail, that a line shows."""


class UnknownWarningError(UserError, ValueError):
    """A kind of warning that `WHAT` does not have."""


@dataclass(frozen=True, slots=True)
class DataWarning:
    """One thing that happened to one sample: its kind (of `WHAT`), the sample's id, and with which numbers.

    `sample_id` is the path of a file where it happened to no sample, and "" where it is no single one's. Raises
    UnknownWarningError.
    """

    kind: str
    sample_id: str
    detail: str

    def __post_init__(self) -> None:
        if self.kind not in WHAT:
            raise UnknownWarningError(f"there is no warning of the kind {self.kind!r}; {did_you_mean(self.kind, WHAT)}")


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
        """Kind -> {"what", "count", "samples": [{"sample_id", "detail"}, …]}, of `count` samples the first `LISTED`."""
        return {
            kind: {
                "what": WHAT[kind],
                "count": len(found),
                "samples": [
                    {"sample_id": printable(name), "detail": printable(detail)} for name, detail in list(found)[:LISTED]
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
        return cls(DataWarning(kind, sample_id, detail) for kind, sample_id, detail in rows if kind in WHAT)

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
        return [(kind, self._found[kind]) for kind in WHAT if kind in self._found]

    def _line(self, kind: str, found: list[tuple[str, str]]) -> str:
        shown = [_short(f"{name}: {detail}" if name and detail else name or detail) for name, detail in found[:SHOWN]]
        more = f"; … and {len(found) - SHOWN} more, see report.json" if len(found) > SHOWN else ""
        return f"{WHAT[kind]}: {len(found)} ({'; '.join(shown)}{more})"


def _short(text: str) -> str:
    return printable(text if len(text) <= _WIDTH else f"{text[: _WIDTH - 40]}…{text[-39:]}")


_current: ContextVar[DataWarnings | None] = ContextVar("data warnings", default=None)


@contextmanager
def collecting() -> Iterator[DataWarnings]:
    """Within it, in this thread, what `warn` is told goes into the result, and nowhere else."""
    found = DataWarnings()
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)


@contextmanager
def about(sample_id: str) -> Iterator[None]:
    """Within it, in this thread, whatever `warn` is told is of this sample, by whatever name it knows it."""
    with collecting() as found:
        yield
    for warning in found:
        warn(warning.kind, sample_id, warning.detail)


def warn(kind: str, sample_id: str, detail: str) -> None:
    """Tell the nearest `collecting`, or without one the log, what happened to a sample.

    Who does not know the sample's id names it by what it has, its file or its caption, of which the detail says
    nothing: `about`, or whoever collects, puts the id in its place. Raises UnknownWarningError.
    """
    warning = DataWarning(kind, sample_id, detail)
    found = _current.get()
    if found is not None:
        found.merge((warning,))
    else:
        logger.warning("%s", DataWarnings((warning,)).lines()[0])
