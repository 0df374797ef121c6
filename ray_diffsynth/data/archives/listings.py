"""The members of archives as an earlier run found them: an archive that has not changed is not opened again."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from ray_diffsynth import storage
from ray_diffsynth.storage.parquet import open_parquet

logger = logging.getLogger(__name__)

VERSION = 1
"""Raise it when the same archive gives another listing: all are opened again then."""
SCHEMA = pa.schema(
    [("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("text", pa.binary())],
)


@dataclass
class Listing:
    """The members of a tar in their order: name, offset and size of the content in bytes, and of a text the content."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    texts: list[bytes | None] = field(default_factory=list)

    def add(self, name: str, offset: int, size: int) -> None:
        """A further member, which has no text so far."""
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.texts.append(None)


class Listings:
    """Listings of archives in a folder. New ones lie in a temporary folder until they are saved.

    They only save time, so what cannot be read is ignored, and what cannot be kept is not.
    """

    def __init__(self, folder: str, temporary: str) -> None:
        self.folder = folder
        self._temporary = temporary
        self._there: frozenset[str] | None = None
        self._used: set[str] = set()
        self._lock = threading.Lock()

    def _kept(self) -> frozenset[str]:
        with self._lock:
            if self._there is None:
                try:
                    self._there = frozenset(storage.list_files(self.folder, suffix=".parquet"))
                except OSError as error:
                    logger.debug("%s is not used: %s", self.folder, error)
                    self._there = frozenset()
            return self._there

    def get(self, path: str, stamp: str) -> Listing | None:
        """What is known of the archive with this stamp."""
        name = _name(path, stamp)
        if not stamp or name not in self._kept():
            return None
        place = storage.join(self.folder, name)
        try:
            with pa.BufferReader(storage.read_bytes(place)) as source, open_parquet(source, place, SCHEMA) as parquet:
                table = parquet.read()
        except (OSError, ValueError, pa.ArrowException) as error:
            logger.debug("%s is not used: %s", place, error)
            return None
        if any(table[column].null_count for column in ("name", "offset", "size")):
            return None
        self._used.add(name)
        return Listing(*(table[column].to_pylist() for column in SCHEMA.names))

    def put(self, path: str, stamp: str, found: Listing) -> None:
        """Keep the listing of an archive with this stamp, which it had before it was opened."""
        if not stamp:  # without one a change could not be noticed
            return
        columns = (found.names, found.offsets, found.sizes, found.texts)
        try:
            arrays = [pa.array(values, type_) for values, type_ in zip(columns, SCHEMA.types, strict=True)]
            table = pa.Table.from_arrays(arrays, schema=SCHEMA)
            pq.write_table(table, os.path.join(self._temporary, _name(path, stamp)), compression="zstd")
        except (OSError, ValueError, pa.ArrowException) as error:  # a name that is no text, a full disk
            logger.debug("the members of %s are not kept: %s", path, error)

    def save(self) -> None:
        """Write what is new, and remove what is of no use to this dataset. Raises OSError."""
        new = sorted(os.listdir(self._temporary))
        for name in new:
            with open(os.path.join(self._temporary, name), "rb") as file:
                storage.write_bytes_atomic(storage.join(self.folder, name), file.read())
        for name in (self._there or frozenset()) - self._used - set(new):
            storage.remove(storage.join(self.folder, name))


def _name(path: str, stamp: str) -> str:
    return f"{hashlib.blake2b(f'{VERSION} {stamp} {path}'.encode(), digest_size=16).hexdigest()}.parquet"


_current: ContextVar[Listings | None] = ContextVar("archive_listings", default=None)


@contextmanager
def kept_listings(folder: str) -> Iterator[Listings]:
    """Within it, archives are read by what is kept in the folder, and their listings are kept when it is saved."""
    with tempfile.TemporaryDirectory(prefix="ray-diffsynth-archives-") as temporary:
        listings = Listings(folder, temporary)
        token = _current.set(listings)
        try:
            yield listings
        finally:
            _current.reset(token)


def listings() -> Listings | None:
    """Those of the innermost `kept_listings`."""
    return _current.get()
