"""Writing beside the training, on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs one write at a time on another thread. The error of one that failed is raised here, as it is."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin `write`, and return. Waits for the one before, and raises its error."""
        self.wait()
        self._writing = self._thread.submit(write)

    def raise_failed(self) -> None:
        """Raise the error of a write that has failed; waits for none."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written; raises the error of what was."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
