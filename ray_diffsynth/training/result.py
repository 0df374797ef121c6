"""What a run did, as the workers tell it and report.json holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    steps: optimizer steps of the whole run so far; total: planned; started_at: where this attempt began. samples: how
    many there are; padded: entries per epoch that fill batches up. loss: of the last step. files: exported this time.
    held_out: samples that are not trained on; validation_loss: the last one. warnings: `DataWarnings.rows` of the whole
    run so far.
    """

    steps: int
    total: int
    started_at: int
    steps_per_epoch: int
    samples: int
    padded: int
    loss: float | None
    seconds: float
    files: list[str] = field(default_factory=list)
    checkpoint: str | None = None
    unused: int = 0
    held_out: int = 0
    validation_loss: float | None = None
    warnings: list[list[str]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.steps == self.total

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def merged(results: Sequence[TrainResult]) -> TrainResult:
    """One result of the groups of workers that trained one after another."""
    first, last = results[0], results[-1]
    files = [file for result in results for file in result.files]
    seconds = sum(result.seconds for result in results)
    return replace(last, started_at=first.started_at, files=files, seconds=seconds)
