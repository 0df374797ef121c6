"""The results of earlier scans by source file, so that a file that has not changed is not read again."""

import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple

from ray_diffsynth.data.scan import SourceFile
from ray_diffsynth.storage import exists, join, read_bytes, write_bytes_atomic

SCAN_CACHE = "index/sources.jsonl"
SCAN_CACHE_VERSION = 3
"""Raise it when the `SourceFile` of the same content changes: all files are read again then."""
SAVES_PER_SCAN = 10
"""How often it is saved during a scan of new files: each time a tenth of them is read."""
MIN_SAVED_FILES = 1024
"""Fewest newly read files that are saved during a scan."""


class ScanCache:
    """Sources by path; of a dataset with these `paths`, others are forgotten.

    Nothing is written unless `remember`. It only saves time, so a damaged one, or one of another version, is ignored.
    """

    def __init__(self, cache: str, paths: Sequence[str], *, remember: bool = True) -> None:
        self.path = join(cache, SCAN_CACHE)
        self.remember = remember
        self.files = _load(self.path, set(paths))
        self._unsaved = 0
        self._step = max(len(paths) // SAVES_PER_SCAN, MIN_SAVED_FILES)

    def known(self, paths: Iterable[str]) -> dict[str, SourceFile]:
        """What is remembered of these paths."""
        return {path: self.files[path] for path in paths if path in self.files}

    def add(self, found: Mapping[str, object]) -> None:
        """Take in what a scan found (not a SourceFile: the path could not be read), and save now and then."""
        for path, file in found.items():
            if not isinstance(file, SourceFile):
                self.files.pop(path, None)
            elif self.files.get(path) != file:
                self.files[path] = file
                self._unsaved += 1
        if self._unsaved >= self._step:
            self.save()

    def save(self) -> None:
        """Write the cache, for a rerun of this run and for the next run."""
        if not self.remember:
            return
        _write(self.path, self.files.values())
        self._unsaved = 0


def forget(cache: str, paths: Collection[str]) -> None:
    """Let the next scan read these files again: they hold something else than what is remembered of them."""
    path = join(cache, SCAN_CACHE)
    files = _load(path)
    if not files.keys().isdisjoint(paths):
        gone = set(paths)
        _write(path, (file for file in files.values() if file.path not in gone))


def _write(path: str, files: Iterable[SourceFile]) -> None:
    text = io.BytesIO()
    text.write(json.dumps({"version": SCAN_CACHE_VERSION}).encode())
    for file in files:
        if file.stamp:  # without one a change could not be noticed
            text.write(b"\n" + json.dumps(astuple(file)).encode())
    write_bytes_atomic(path, text.getbuffer())


def _load(path: str, wanted: Collection[str] | None = None) -> dict[str, SourceFile]:
    """What is remembered, by path; only of the `wanted` paths, if they are given."""
    if not exists(path):
        return {}
    files = {}
    try:
        header, *rows = read_bytes(path).split(b"\n")
        if json.loads(header) != {"version": SCAN_CACHE_VERSION}:
            return {}
        for row in rows:
            file = SourceFile(*json.loads(row))
            if wanted is None or file.path in wanted:
                files[file.path] = file
    except (ValueError, TypeError):
        return {}
    return files
