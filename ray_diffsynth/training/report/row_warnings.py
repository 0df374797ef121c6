"""What units and decoders say of the data while a run trains, summed over its workers and over its attempts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ray_diffsynth.data.warnings import DataWarnings
from ray_diffsynth.training.distributed import gather


class SaidOfData:
    """`own`: what this worker collects while it works. earlier: the rows of what was said up to the checkpoint.

    `all` is complete for what was summed last: on each worker the same.
    """

    def __init__(self, own: DataWarnings, earlier: Iterable[Sequence[str]] = ()) -> None:
        self._own = own
        self.all = DataWarnings.of(earlier)
        self._told = DataWarnings(self.all)

    def sum(self, world_size: int) -> None:
        """Take in what all workers have collected; each must call it."""
        rows: list[Sequence[str]] = [*self._own.rows()]
        self.all.merge(DataWarnings.of(gather(rows, world_size)))

    def untold(self) -> list[str]:
        """A line for each kind of what was not told before; it is told now."""
        told = set(self._told)
        lines = DataWarnings(warning for warning in self.all if warning not in told).lines()
        self._told.merge(self.all)
        return lines
