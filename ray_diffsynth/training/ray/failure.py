"""Errors in workers: one that would come again ends the run at once, with its place; what was lost is tried again."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping

import torch.distributed as dist

from ray_diffsynth.errors import UserError, remote_cause

_LOST = re.compile(
    r"Connection (closed|reset|refused|aborted)|Broken pipe|pair closure|Timed out waiting|NCCL|gloo", re.IGNORECASE
)
"""What a collective operation says when another worker is gone."""
_LIBRARIES = ("site-packages", "dist-packages", "/lib/python3")


class WorkerError(UserError):
    """An error in a worker that nobody foresaw: a mistake in a model, an optimizer or here, which would come again."""

    @classmethod
    def of(cls, error: BaseException, rank: int, world_size: int) -> WorkerError:
        """Its message says what and where; the whole trace is a note."""
        frames = traceback.extract_tb(error.__traceback__)
        place = "" if not frames else f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}"
        if frames:
            own = [frame for frame in frames if not any(part in frame.filename for part in _LIBRARIES)]
            if own and own[-1] is not frames[-1]:
                place += f"; called at {own[-1].filename}:{own[-1].lineno}"
            place += ")"
        text = str(error).strip() or "no message"
        found = cls(f"worker {rank} of {world_size} failed: {type(error).__name__}: {text}{place}")
        found.add_note("".join(traceback.format_exception(error)).rstrip())
        return found


def is_lost_connection(error: BaseException) -> bool:
    """Whether this is what a worker raises because another one is gone."""
    return any(
        isinstance(each, (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError))
        or (isinstance(each, RuntimeError) and not isinstance(each, UserError) and _LOST.search(str(each)) is not None)
        for each in _chain(error)
    )


def reason(failures: Mapping[int, BaseException]) -> UserError | None:
    """What to tell of the failures of a group (rank -> error) that would come again; None if a worker was lost.

    The errors of those that only missed a lost one say nothing.
    """
    found = [failures[rank] for rank in sorted(failures)]
    found = [cause if isinstance(cause := remote_cause(error), UserError) else error for error in found]
    told = [error for error in found if isinstance(error, UserError)]
    foreseen = [error for error in told if not isinstance(error, WorkerError)]
    if foreseen:
        return foreseen[0]
    deaths = [error for error in found if not isinstance(error, UserError) and not is_lost_connection(error)]
    return told[0] if told and not deaths else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
