"""Copies of remote files in a folder of this machine, shared by its processes, up to a size."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from ray_diffsynth import storage

_SUFFIX = ".copy"


class LocalCopies:
    """A file is fetched whole the first time that a process of this machine opens it, and again only if it changed
    there (size, time or ETag). Beyond `limit` bytes those used the longest ago are removed.

    Several threads and processes may use one folder: each file is fetched by one of them, and appears whole.
    `fetched` counts what this object fetched.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder = Path(storage.absolute(folder))
        self.limit = limit
        self.fetched = 0
        (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()

    def open(self, path: str) -> pa.NativeFile:
        """A seekable file with the content of `path`. Raises OSError.

        A local path is opened where it is, and so is one whose store has no version of the file to compare.
        """
        stamp = storage.stamp(path) if storage.is_remote(path) else ""
        if not stamp:
            return storage.open_input(path)
        name = hashlib.blake2b(f"{path}\n{stamp}".encode(), digest_size=16).hexdigest()
        copy = self.folder / f"{name}{_SUFFIX}"
        with self._alone(name):
            if not copy.exists():
                storage.write_bytes_atomic(str(copy), storage.read_bytes(path))
                self.fetched += 1
            os.utime(copy)  # the time of the last use
            opened = storage.open_input(str(copy))  # before it can be removed: an open file stays readable
        self._make_room(keep=copy)
        return opened

    def _remove_unfinished(self) -> None:
        """What processes left that were killed while they fetched: a file that is being fetched has its lock held."""
        for path in storage.list_unfinished(str(self.folder)):
            with open(self._lock_of(Path(path).name[1:]), "ab") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                storage.remove(path)

    def _lock_of(self, name: str) -> Path:
        return self.folder / ".locks" / name[:2]

    def _make_room(self, keep: Path) -> None:
        entries = []
        for copy in self.folder.glob(f"*{_SUFFIX}"):
            try:
                found = copy.stat()
            except FileNotFoundError:  # another process made room too
                continue
            entries.append((found.st_mtime_ns, found.st_size, copy))
        held = sum(size for _, size, _ in entries)
        for _, size, copy in sorted(entries):
            if held <= self.limit:
                return
            if copy != keep:
                copy.unlink(missing_ok=True)
                held -= size

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One of the machine's threads and processes at a time, for the names that begin alike."""
        with open(self._lock_of(name), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
