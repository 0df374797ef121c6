"""Which command writes into an output path: the one that was started on it last.

A worker whose driver was killed may live on for a while, on a node that is cut off even for a minute, and would mix its
checkpoints with those of the same command run again. So each command leaves a name of its own, and a worker that finds
another one writes nothing more.
"""

from __future__ import annotations

import uuid

from ray_diffsynth.storage import join, read_bytes, write_bytes_atomic
from ray_diffsynth.training.errors import TrainingError

ATTEMPT_FILE = ".attempt"


def begin_attempt(output_path: str) -> None:
    """From now on what was started on `output_path` before writes no checkpoint there. Call it once a command."""
    write_bytes_atomic(join(output_path, ATTEMPT_FILE), uuid.uuid4().hex.encode())


class Attempt:
    """The attempt that a worker belongs to: the newest when it starts."""

    def __init__(self, output_path: str) -> None:
        self._output_path = output_path
        self._name = self._newest()

    def check(self) -> None:
        """Raise TrainingError if a newer one was begun. Raises StorageError."""
        if self._newest() != self._name:
            raise TrainingError(
                f"another command was started on {self._output_path} while this one ran; this one ends and writes "
                "nothing more there. To train both, give each its own --output_path"
            )

    def _newest(self) -> bytes | None:
        try:
            return read_bytes(join(self._output_path, ATTEMPT_FILE))
        except (FileNotFoundError, NotADirectoryError):
            return None
