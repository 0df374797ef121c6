"""The results of earlier scans by source file, so that a file that has not changed is not read again.

They lie in parts, `<cache>/index/sources/<number>.parquet`, to which a scan adds; of the same path the last one counts.
In memory are 25 bytes a file.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_diffsynth.data.scan import SourceFile
from ray_diffsynth.preprocess.key_columns import Keys, Numbers, hashed, positions
from ray_diffsynth.storage import exists, join, list_files, read_bytes, remove, write_bytes_atomic
from ray_diffsynth.storage.parquet import open_parquet

logger = logging.getLogger(__name__)

SCAN_CACHE = "index/sources"
BEFORE_PARTS = "index/sources.jsonl"
"""What earlier versions wrote."""
SCAN_CACHE_VERSION = 4
"""Raise it when the `SourceFile` of the same content changes: all files are read again then."""
PART_FILES = 16384
"""Files of a full part: what a scan that is killed has to read again at most."""
SMALL_PARTS = 16
"""Parts of less than half of that which may lie there; more are made one."""
_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}
SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in get_type_hints(SourceFile).items()])
_PLACE = 32
"""A place is the number of a part, and in so many bits the row in it."""
_ROW = (1 << _PLACE) - 1


class ScanCache:
    """What is remembered of source files, by path. Nothing is written unless `remember`.

    It only saves time, so a damaged part, or one of another version, is ignored.
    """

    def __init__(self, cache: str, *, remember: bool = True) -> None:
        self.cache, self.folder, self.remember = cache, join(cache, SCAN_CACHE), remember
        self._files = list_files(self.folder, suffix=".parquet") if exists(self.folder) else []
        self._next = 1 + max((int(name[:-8]) for name in self._files if name[:-8].isdigit()), default=0)
        self._unsaved: dict[str, SourceFile] = {}
        self._last_read: tuple[int, pa.Table] | None = None
        self._hashes, self._places, self._rows = self._index()
        self._used = np.zeros(len(self._hashes), bool)

    def _index(self) -> tuple[Keys, Numbers, list[int]]:
        """Hashes of all paths, sorted; the place of the last row of each; and how many rows each part has."""
        found = []
        for number in range(len(self._files)):
            found.append(hashed(self._part(number, ["path"])["path"].to_pylist()))
        rows = [len(part) for part in found]
        places = [np.arange(count) + (number << _PLACE) for number, count in enumerate(rows)]
        where = np.concatenate([*places, np.empty(0, np.int64)]).astype(np.int64)
        hashes, last = np.unique(np.concatenate([*found, hashed([])])[::-1], return_index=True)
        return hashes, where[::-1][last], rows

    def _part(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        path = join(self.folder, self._files[number])
        try:
            with pa.BufferReader(read_bytes(path)) as source, open_parquet(source, path, SCHEMA) as parquet:
                version = (parquet.metadata.metadata or {}).get(b"version")
                table = parquet.read(columns)
                if version == str(SCAN_CACHE_VERSION).encode() and not any(c.null_count for c in table.columns):
                    return table
        except (OSError, ValueError, pa.ArrowException) as error:
            logger.debug("%s is not used: %s", path, error)
        return SCHEMA.empty_table()

    def known(self, paths: Collection[str]) -> dict[str, SourceFile]:
        """What is remembered of these paths."""
        names = list(paths)
        found = positions(hashed(names), self._hashes)
        self._used[found[found >= 0]] = True
        files: dict[str, SourceFile] = {}
        numbers = np.flatnonzero(found >= 0)
        places = self._places[found[numbers]]
        for part in np.unique(places >> _PLACE).tolist():
            rows = places[places >> _PLACE == part] & _ROW
            files |= {file.path: file for file in self._rows_of(part, rows) if file.stamp}
        return {path: files[path] for path in names if path in files}

    def _rows_of(self, part: int, rows: Numbers) -> Iterable[SourceFile]:
        if self._last_read is None or self._last_read[0] != part:
            self._last_read = (part, self._part(part))
        table = self._last_read[1]
        if len(table) != self._rows[part]:  # another process has written it anew
            return ()
        return (SourceFile(**row) for row in table.take(pa.array(rows)).to_pylist())

    def add(self, found: Mapping[str, object], known: Mapping[str, SourceFile]) -> None:
        """Take in what a scan found (not a SourceFile: the path could not be read), and what was known of these."""
        for path, file in found.items():
            if isinstance(file, SourceFile):
                if file.stamp and known.get(path) != file:  # without a stamp a change could not be noticed
                    self._unsaved[path] = file
            elif path in known:
                self._unsaved[path] = _nothing(path)
        if len(self._unsaved) >= PART_FILES:
            self.save()

    def save(self) -> None:
        """Write what is new, for a rerun of this run and for the next run."""
        if self.remember and self._unsaved:
            self._write(list(self._unsaved.values()))
            before = positions(hashed(self._unsaved), self._hashes)
            self._used[before[before >= 0]] = False
        self._unsaved = {}

    def finish(self) -> None:
        """At the end of a scan: write what is new, and the parts anew that hold little of use or are many and small.

        What nothing asked for is of use no more.
        """
        self.save()
        if not self.remember:
            return
        places = self._places[self._used]
        used = np.bincount(places >> _PLACE, minlength=len(self._rows)).tolist()
        poor = [part for part, rows in enumerate(self._rows) if used[part] * 2 < rows or not rows]
        small = [part for part, rows in enumerate(self._rows) if rows * 2 < PART_FILES]
        again = sorted({*poor, *(small if len(small) > SMALL_PARTS else [])})
        kept: list[SourceFile] = []
        for part in again:
            rows = np.sort(places[places >> _PLACE == part]) & _ROW
            kept += (file for file in self._rows_of(part, rows) if file.stamp)
            if len(kept) >= PART_FILES:
                self._write(kept)
                kept = []
        if kept:
            self._write(kept)
        for part in again:
            remove(join(self.folder, self._files[part]))
        remove(join(self.cache, BEFORE_PARTS))

    def _write(self, files: Sequence[SourceFile]) -> None:
        columns = zip(*map(astuple, files), strict=True)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
        out = pa.BufferOutputStream()
        versioned = SCHEMA.with_metadata({"version": str(SCAN_CACHE_VERSION)})
        pq.write_table(pa.Table.from_arrays(arrays, schema=versioned), out, compression="zstd")
        write_bytes_atomic(join(self.folder, f"{self._next:08d}.parquet"), out.getvalue())
        self._next += 1


def forget(cache: str, paths: Collection[str]) -> None:
    """Let the next scan read these files again: they hold something else than what is remembered of them."""
    scan_cache = ScanCache(cache)
    known = scan_cache.known(paths)
    scan_cache.add(dict.fromkeys(known), known)
    scan_cache.save()


def _nothing(path: str) -> SourceFile:
    """What stands for a file of which nothing is known any more: one without a stamp."""
    return SourceFile(path, "", 0, 0, "")
