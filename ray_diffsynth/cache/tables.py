"""The index and quarantine tables of a cache as bytes: written under their hash, read by their exact columns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa

from ray_diffsynth import storage
from ray_diffsynth.cache.errors import CacheError, UnreadableError, repair_advice
from ray_diffsynth.cache.layout import parquet_bytes
from ray_diffsynth.cache.names import inside
from ray_diffsynth.storage.parquet import open_parquet


def table_bytes(table: pa.Table) -> pa.Buffer:
    """The table as a Parquet file."""
    return parquet_bytes(table, compression="zstd")


def table_hash(data: bytes | pa.Buffer) -> str:
    """Hex blake2b-128: the name of a table's file."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_table(cache: str, file: str, digest: str, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The table `<cache>/<file>`, which has these columns and this hash; of it only `columns`, if given.

    Raises CacheError when it is absent, damaged or another; UnreadableError when it cannot be read just now, and
    UnsafeNameError if it lies out of the cache.
    """
    path = inside(cache, file)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise CacheError(f"{path} is absent; {repair_advice(cache)}") from error
    except OSError as error:
        raise UnreadableError(path, error) from error
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    try:
        if table_hash(data) != digest:
            raise ValueError("its content does not match its hash in the manifest")
        with pa.BufferReader(data) as source, open_parquet(source, path, schema) as parquet:
            return parquet.read(wanted.names).select(wanted.names).cast(wanted)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise CacheError(f"{path} cannot be used: {error}; {repair_advice(cache)}") from error
