"""A file that is read here and there: what lies between is not fetched, and what lies close together is, at once."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_diffsynth.storage.paths import local_path
from ray_diffsynth.storage.raw import read_range
from ray_diffsynth.urls import is_remote

CLOSE_BYTES = 16 << 10
"""A gap between two reads that is fetched with them: a request takes longer than that many bytes."""
MOST_BYTES = 1 << 20
"""What is fetched at once of reads that follow each other closely; a read of more is fetched as it is."""

Read = Callable[[int, int], bytes]
"""read(start, count): those bytes of a file, fewer where it ends."""


@contextmanager
def opened_ranges(path: str) -> Iterator[Read]:
    """What reads ranges of a file, which is no member of an archive. It raises OSError, as the opening does."""
    if is_remote(path):
        yield lambda start, count: read_range(path, start, count)
        return
    with open(local_path(path), "rb", buffering=0) as file:
        yield lambda start, count: os.pread(file.fileno(), count, start)


class RangedFile(io.RawIOBase):
    """A file of `size` bytes for who reads a little, goes far ahead, and reads a little again, such as tar's headers.

    After a gap as much is fetched as was used after the last one; closer reads are fetched in larger and larger pieces.
    """

    def __init__(self, read: Read, size: int) -> None:
        self._read, self._size = read, size
        self._at = 0
        self._start, self._data = 0, b""
        self._began = self._used = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file; ahead of the end too."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise ValueError(f"no byte lies at {origin + offset}")
        self._at = origin + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, fewer only at the end; all that follow for a negative one. Raises what `read` does."""
        left = max(self._size - self._at, 0)
        count = left if size is None or size < 0 else min(size, left)
        if not count:
            return b""
        if not self._start <= self._at <= self._at + count <= self._start + len(self._data):
            self._fetch(count)
        found = self._data[self._at - self._start :][:count]
        self._at += len(found)
        self._used = max(self._used, self._at)
        return found

    def _fetch(self, count: int) -> None:
        end = self._start + len(self._data)
        if self._data and self._start <= self._at <= end + CLOSE_BYTES:
            window = min(2 * len(self._data), MOST_BYTES)
        else:
            window = min(self._used - self._began, MOST_BYTES)
            self._began = self._used = self._at
        window = min(max(count, window), self._size - self._at)
        self._start, self._data = self._at, self._read(self._at, window)
