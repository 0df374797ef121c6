"""Warnings of units and decoders about the data while a run trains, over all its workers and attempts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ray_diffsynth.data.warnings import DataWarnings
from ray_diffsynth.training.distributed import all_gather


class RowWarnings:
    """own: what this worker collects (see `data.warnings.collecting`). earlier: the rows of the checkpoint's warnings.

    all: those of all workers and attempts up to the last `gather`, on each worker the same.
    """

    def __init__(self, own: DataWarnings, earlier: Iterable[Sequence[str]] = ()) -> None:
        self._own = own
        self.all = DataWarnings.of(earlier)
        self._reported = DataWarnings(self.all)

    def gather(self, world_size: int) -> None:
        """Take in what all workers have collected; each must call it."""
        rows: list[Sequence[str]] = [*self._own.rows()]
        self.all.merge(DataWarnings.of(all_gather(rows, world_size)))

    def unreported(self) -> list[str]:
        """A line for each kind of warning that was not returned before."""
        reported = set(self._reported)
        lines = DataWarnings(warning for warning in self.all if warning not in reported).lines()
        self._reported.merge(self.all)
        return lines
