"""An open file that keeps the error of its storage, so that it is told from what is wrong with the content."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, TypeVar

T = TypeVar("T")


class WatchedFile:
    """A file for reading. `error`: what its storage raised last, however a decoder reports that."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: Exception | None = None

    def _watch(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except Exception as error:
            self.error = error
            raise

    def read(self, size: int = -1) -> bytes:
        return self._watch(lambda: self.file.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._watch(lambda: self.file.seek(offset, whence))

    def tell(self) -> int:
        return self._watch(self.file.tell)

    @property
    def closed(self) -> bool:
        return self.file.closed

    def close(self) -> None:
        self.file.close()
