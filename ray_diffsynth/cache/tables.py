"""Index and quarantine of a cache: tables in parts, each a Parquet file under its hash, read by their exact columns."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from ray_diffsynth import storage
from ray_diffsynth.cache.cuts import cut
from ray_diffsynth.cache.errors import AbsentError, CacheError, MissingFilesError, UnreadableError, repair_advice
from ray_diffsynth.cache.layout import parquet_bytes
from ray_diffsynth.cache.names import inside
from ray_diffsynth.storage.parquet import open_parquet

WRITE_THREADS, READ_THREADS = 4, 16
"""Parts at the same time: each is one request of an object store, and holds its bytes in memory."""
REPEATED = ("bucket", "error", "group")
"""Columns of few values, beside those of files."""


@dataclass(frozen=True)
class Part:
    """A file of a table: its path relative to the cache, whose stem is the hash of its bytes, and its rows."""

    file: str
    rows: int

    @property
    def hash(self) -> str:
        """Hex blake2b-128 of the file."""
        return self.file.rpartition("/")[2].removesuffix(".parquet")


def table_bytes(table: pa.Table) -> pa.Buffer:
    """The table as a Parquet file; only columns whose values repeat have a dictionary: another's holds all of them."""
    repeated = [name for name in table.column_names if name in REPEATED or name.endswith("_file")]
    return parquet_bytes(table, compression="zstd", use_dictionary=repeated)


def table_hash(data: bytes | pa.Buffer) -> str:
    """Hex blake2b-128: the name of a table's file."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def write_parts(
    cache: str, folder: str, table: pa.Table, there: Collection[str] = (), *, whole: bool = False
) -> tuple[Part, ...]:
    """Write `<cache>/<folder>/<hash>.parquet` for each part of the table, cut by its column sample_id.

    there: paths, relative to the cache, of files that need not be written again. whole: in one part. Raises OSError.
    """

    def write(rows: range) -> Part:
        data = table_bytes(table.slice(rows.start, len(rows)).combine_chunks())
        part = Part(f"{folder}/{table_hash(data)}.parquet", len(rows))
        if part.file not in there:
            storage.write_bytes_atomic(storage.join(cache, part.file), data)
        return part

    cuts = [range(table.num_rows)] if whole else cut(table.column("sample_id"))
    with ThreadPoolExecutor(WRITE_THREADS) as pool:
        return tuple(pool.map(write, cuts))


def read_parts(cache: str, parts: Sequence[Part], schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of these parts, which have these columns and their hashes; of it only `columns`, if given.

    Raises CacheError when one is absent (and says how many are), damaged or another; UnreadableError when one cannot be
    read just now, and UnsafeNameError if one lies out of the cache.
    """
    try:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            tables = list(pool.map(lambda part: _read_part(cache, part, schema, columns), parts))
    except AbsentError as error:
        folder = parts[0].file.rpartition("/")[0]
        held = storage.file_sizes(inside(cache, folder))
        wanted = [part.file.rpartition("/")[2] for part in parts]
        if absent := sorted({file for file in wanted if file not in held}):
            raise MissingFilesError(cache, folder, absent, len(wanted)) from error
        raise
    return pa.concat_tables(tables)


def _read_part(cache: str, part: Part, schema: pa.Schema, columns: Sequence[str] | None) -> pa.Table:
    path = inside(cache, part.file)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise AbsentError(f"{path} is absent; {repair_advice(cache)}") from error
    except OSError as error:
        raise UnreadableError(path, error) from error
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    try:
        if table_hash(data) != part.hash:
            raise ValueError("its content does not match its hash in the manifest")
        with pa.BufferReader(data) as source, open_parquet(source, path, schema) as parquet:
            if parquet.metadata.num_rows != part.rows:
                raise ValueError(f"it has {parquet.metadata.num_rows} rows, the manifest says {part.rows}")
            return parquet.read(wanted.names, use_threads=False).select(wanted.names).cast(wanted)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise CacheError(f"{path} cannot be used: {error}; {repair_advice(cache)}") from error
