"""Which command writes into an output path: the one that holds its lease.

A worker whose driver was killed may live on for a while, on a node that is cut off even for a minute, and would mix its
checkpoints with those of the same command run again. So a worker that finds the lease another's writes nothing more.
"""

from __future__ import annotations

from ray_diffsynth.cache.lease import owner
from ray_diffsynth.training.errors import TrainingError


class Attempt:
    """The attempt that a worker belongs to: that of the command which has the output path when the worker starts."""

    def __init__(self, output_path: str) -> None:
        """Raises StorageError."""
        self._output_path = output_path
        self._owner = owner(output_path)

    def check(self) -> None:
        """Raise TrainingError if another command has the output path, or had it meanwhile. Raises StorageError."""
        if owner(self._output_path) != self._owner:
            raise TrainingError(
                f"another command was started on {self._output_path} while this one ran; this one ends and writes "
                "nothing more there. To train both, give each its own --output_path"
            )
