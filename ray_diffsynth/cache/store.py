"""Group tables on disk: one Parquet file per shard, written whole or not at all, the same bytes for the same rows."""

from __future__ import annotations

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_diffsynth import storage
from ray_diffsynth.cache.bounds import MAX_VALUE_BYTES
from ray_diffsynth.cache.codec import check_codec
from ray_diffsynth.cache.errors import CacheError as CacheError
from ray_diffsynth.cache.errors import UnreadableError, VersionError
from ray_diffsynth.cache.layout import equal_groups, largest_cell, parquet_bytes
from ray_diffsynth.cache.names import check_group, inside, is_shard, shard_path
from ray_diffsynth.cache.row_warnings import RowWarnings, parse_row_warnings
from ray_diffsynth.cache.schema import KEY, row_views, table_from_rows, table_parameters, table_schema
from ray_diffsynth.storage.parquet import check_schema, open_parquet

SHARD_VERSION = 2
"""2: checksums are XXH3-64 (1: CRC-32)."""
_METADATA = b"ray_diffsynth"
HEADER_BYTES = 64 << 10
"""What is fetched at once of a remote shard for its header: an object store's usual read-ahead is the whole shard."""
READ_ERRORS = (OSError, pa.ArrowException, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a damaged Parquet file and its header raises."""


def failed_to_read(error: Exception) -> bool:
    """Whether rights, network or disk are to blame, not a file's content (for which pyarrow raises OSError too)."""
    plain = type(error) is OSError and error.errno in (None, errno.EINVAL)  # EINVAL: a damaged footer's offsets
    return isinstance(error, OSError) and not plain


@dataclass(frozen=True)
class GroupRow:
    """One row of a group: its content address and its parameters (those that a unit returned)."""

    key: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Shard:
    """One file of a group: `<cache>/<group>/<file>`, the keys of its rows in order, and its size in bytes.

    Row i stands in row group i // rows_per_group, at i % rows_per_group. `failed` are the keys that were tried with the
    others and could not be encoded, with error class and message: a rerun need not try them again. `warnings`: key ->
    warnings of that row, a function of what its key stands for.
    """

    group: str
    file: str
    bucket: str
    keys: tuple[str, ...]
    nbytes: int
    codec: str
    rows_per_group: int
    failed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    warnings: Mapping[str, RowWarnings] = field(default_factory=dict)

    def locate(self, position: int) -> tuple[int, int]:
        """(row group, row in it) of the file's row `position`, as the index wants them."""
        return divmod(position, self.rows_per_group)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"keys": list(self.keys)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Shard:
        """The inverse of `to_dict`."""
        failed = {key: (error, message) for key, (error, message) in content.get("failed", {}).items()}
        warnings = {
            key: pairs for key, value in content.get("warnings", {}).items() if (pairs := parse_row_warnings(value))
        }
        return cls(**{**content, "keys": tuple(content["keys"]), "failed": failed, "warnings": warnings})


def shard_name(keys: Sequence[str]) -> str:
    """File stem of the shard of these keys: the blake2b-96 of them."""
    return hashlib.blake2b("\n".join(keys).encode(), digest_size=12).hexdigest()


def _as_table(
    rows: Sequence[GroupRow] | pa.Table, parameters: Sequence[str] | None, codec: str, where: str
) -> pa.Table:
    if isinstance(rows, pa.Table):
        # Ray may hand on a table of another but equal layout (chunks, element names): back to the one on disk.
        table = rows.cast(table_schema(table_parameters(rows.schema))).combine_chunks()
        for view in row_views(table):
            if not view.is_intact(codec):
                raise CacheError(f"{where}: row {view.key} was damaged on its way, or not encoded with {codec}")
        return table
    if parameters is None:
        parameters = tuple(dict.fromkeys(name for row in rows for name in row.values))
    return table_from_rows([row.key for row in rows], [row.values for row in rows], parameters, codec)


def write_shard(
    cache: str,
    group: str,
    name: str,
    bucket: str,
    rows: Sequence[GroupRow] | pa.Table,
    *,
    codec: str,
    parameters: Sequence[str] | None = None,
    rows_per_group: int | None = None,
    failed: Mapping[str, Sequence[str]] | None = None,
    warnings: Mapping[str, RowWarnings] | None = None,
) -> Shard:
    """Write `<cache>/<group>/<name>.parquet` atomically; equal rows give equal bytes (no time, no host in the file).

    A table must come from `table_from_rows` with the same codec: its checksums are verified. `parameters` are the
    columns (default: those that the rows have, in order of appearance). One row group holds all rows unless
    `rows_per_group` is given, or they are larger than a row group may be. Raises CacheError for no rows and none
    failed, repeated keys, a checksum that does not hold or a value of more than 2 GiB; UnsafeNameError for a `name`
    that is not 24 hexadecimal digits (see `shard_name`).
    """
    check_codec(codec)
    path = shard_path(cache, group, f"{name}.parquet")
    table = _as_table(rows, parameters, codec, path)
    keys = tuple(table.column(KEY).to_pylist())
    reasons = {key: (error, message) for key, (error, message) in (failed or {}).items()}
    if not keys and not reasons:
        raise CacheError(f"{path}: a shard needs at least one row, or one that failed")
    if repeated := sorted(key for key, count in Counter([*keys, *reasons]).items() if count > 1):
        raise CacheError(f"{path}: the key {repeated[0]} comes twice in one shard")
    if (largest := largest_cell(table)) > MAX_VALUE_BYTES:
        raise CacheError(
            f"{path}: a value of {largest:,} bytes cannot be stored, only one of up to {MAX_VALUE_BYTES:,}; divide it"
        )
    per_group = rows_per_group or equal_groups(table)
    header: dict[str, Any] = {"version": SHARD_VERSION, "group": group, "bucket": bucket, "codec": codec}
    header |= {"rows_per_group": per_group, "failed": reasons}
    header |= {"warnings": warnings} if warnings else {}
    table = table.replace_schema_metadata({_METADATA: json.dumps(header, sort_keys=True)})
    # Values are compressed already and each is its own: no dictionary, no compression, no min/max of whole latents.
    data = parquet_bytes(table, per_group, compression="NONE", use_dictionary=False, write_statistics=[KEY])
    storage.write_bytes_atomic(path, data)
    return Shard(group, f"{name}.parquet", bucket, keys, data.size, codec, per_group, reasons, warnings or {})


class ForeignFileError(CacheError):
    """A Parquet file of another program."""


def _header(file: pq.ParquetFile, path: str) -> dict[str, Any]:
    text = (file.schema_arrow.metadata or {}).get(_METADATA)
    if text is None:
        raise ForeignFileError(f"{path} is a Parquet file of another program, not a shard of a cache")
    header: dict[str, Any] = json.loads(text)
    if header["version"] != SHARD_VERSION:
        raise VersionError(path, header["version"], SHARD_VERSION)
    check_codec(header["codec"])
    if not (type(header["rows_per_group"]) is int and header["rows_per_group"] > 0):
        raise ValueError(f"its header has {header['rows_per_group']!r} rows in a row group")
    if not all(isinstance(header[name], str) for name in ("group", "bucket")):
        raise ValueError("its header has a group or a bucket that is no text")
    return header


@contextmanager
def as_shard(
    source: pa.NativeFile, path: str, parameters: Collection[str] | None = None
) -> Iterator[tuple[pq.ParquetFile, dict[str, Any]]]:
    """The Parquet file in `source`, whose columns are exactly those of a shard (of these parameters), and its header.

    The header has `version`, `group`, `bucket`, `codec`, `rows_per_group` and `failed`. Raises ForeignFileError,
    VersionError, and CacheError or READ_ERRORS (ColumnError among them) for a damaged file.
    """
    with open_parquet(source, path) as parquet:
        header = _header(parquet, path)
        schema = parquet.schema_arrow
        held = table_parameters(schema)
        check_schema(schema, table_schema(held), path)
        if parameters is not None and set(held) != set(parameters):
            raise CacheError(f"it holds the parameters {', '.join(held)}, not {', '.join(parameters)}")
        yield parquet, header


@contextmanager
def open_shard(
    path: str, parameters: Collection[str] | None = None, *, whole: bool = False
) -> Iterator[tuple[pq.ParquetFile, dict[str, Any], int]]:
    """`as_shard` of a file, and its size; `whole` fetches it in one piece, else only what is asked for is read.

    Raises also FileNotFoundError, and UnreadableError for any other failure to read.
    """
    try:
        if whole:
            source: pa.NativeFile = pa.BufferReader(storage.read_bytes(path))
        else:
            source = storage.open_input(path, block_size=HEADER_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(path, error) from error
    with source, as_shard(source, path, parameters) as (parquet, header):
        yield parquet, header, source.size()


def read_shard_header(cache: str, group: str, file: str, *, verify: bool = False) -> Shard:
    """The shard as its own file describes it (to recover what an interrupted run wrote).

    `verify` also reads every row and its checksum. Raises CacheError naming the file when it is absent or damaged;
    UnreadableError, VersionError and ForeignFileError among them when it may well be good.
    """
    path = shard_path(cache, group, file)
    try:
        with open_shard(path, whole=verify) as (parquet, header, nbytes):
            if header["group"] != group:
                raise CacheError(f"belongs to the group {header['group']}, not {group}")
            table = parquet.read(None if verify else [KEY])
            if verify and (bad := [view.key for view in row_views(table) if not view.is_intact(header["codec"])]):
                raise CacheError(f"{len(bad)} of {table.num_rows} rows do not match their checksum, first {bad[0]}")
            keys = tuple(table.column(KEY).to_pylist())
            facts = {name: header[name] for name in ("group", "bucket", "codec", "rows_per_group", "failed")}
            facts["warnings"] = header.get("warnings", {})
            return Shard.from_dict({**facts, "file": file, "keys": keys, "nbytes": nbytes})
    except (UnreadableError, VersionError, ForeignFileError):
        raise
    except (CacheError, *READ_ERRORS) as error:
        raise CacheError(f"the cache file {path} cannot be used: {error}") from error


def list_shards(cache: str, group: str) -> list[str]:
    """Names of the shard files that lie in a group's folder, committed or not, sorted; whatever else lies there is not
    named as one.

    For recovery and pruning only: a reader takes what the manifest names. Raises UnsafeNameError.
    """
    check_group(group, cache)
    return [file for file in storage.list_files(inside(cache, group), suffix=".parquet") if is_shard(file)]
