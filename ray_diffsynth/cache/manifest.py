"""The commit point of a cache: `manifest.json`, and the index and quarantine tables that it names by their hash.

Whatever lies in the folder besides what a committed manifest names does not exist for a reader.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_diffsynth import storage
from ray_diffsynth.cache.errors import CacheError as CacheError
from ray_diffsynth.cache.errors import UnreadableError, VersionError, repair_advice
from ray_diffsynth.cache.names import (
    INDEX_FOLDER,
    QUARANTINE_FOLDER,
    check_group,
    check_shard,
    check_shards,
    check_table,
    inside,
    is_table,
)
from ray_diffsynth.cache.tables import read_table, table_bytes, table_hash
from ray_diffsynth.program import command

MANIFEST_VERSION = 3
"""3: keys stand on stated versions, not on hashes of code; 2: the rows' checksums are XXH3-64 (1: CRC-32)."""
READABLE_VERSIONS = (2, 3)
"""Training reads both alike; stage 1 goes on only with a cache whose keys are made as its own."""
MANIFEST_FILE = "manifest.json"
DTYPES = ("bfloat16", "float32", "float16")
"""In which encoders run."""

QUARANTINE_SCHEMA = pa.schema([(n, pa.string()) for n in ("sample_id", "source", "error", "message", "group", "key")])
"""`group` and `key`: of what could not be encoded; null for a row that failed before that."""


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """A group of stage-1 units: what its table holds (parameters, distinct rows, bytes) and what it depends on.

    `parts` is the readable fingerprint. `empty_key` is the row of the empty caption, `empty_at` its (file, row group,
    row); None in groups that no caption flows into.
    """

    name: str
    parameters: tuple[str, ...]
    fingerprint: str
    parts: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    nbytes: int = 0
    empty_key: str | None = None
    empty_at: tuple[str, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A committed cache. `buckets`: name -> samples, in index order. `counts` has at least samples, quarantined, total.

    `commit` fills in the three fields of the index and quarantine files. No times and no host names: the same cache
    has the same manifest and the same `hash`.
    """

    family: str
    task: str
    trainable: tuple[str, ...]
    parameters: tuple[str, ...]
    groups: tuple[GroupSpec, ...]
    buckets: dict[str, int]
    counts: dict[str, int]
    codec: str
    dtype: str
    index_file: str = ""
    index_hash: str = ""
    quarantine_file: str = ""
    version: int = MANIFEST_VERSION

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `version` first, buckets in their order."""
        return {"version": self.version} | asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Manifest:
        """The inverse of `to_dict`. Raises TypeError or KeyError for absent or unknown fields."""
        values = dict(content)
        if values["version"] == 2 and values.get("settings") == {}:  # nothing was ever in it
            del values["settings"]
        groups = []
        for group in values["groups"]:
            at = group.get("empty_at")
            tuples = {"parameters": tuple(group["parameters"]), "empty_at": at and (str(at[0]), int(at[1]), int(at[2]))}
            groups.append(GroupSpec(**{**group, **tuples}))
        for name in ("trainable", "parameters"):
            values[name] = tuple(values[name])
        return cls(**{**values, "groups": tuple(groups)})

    @classmethod
    def load(cls, cache: str) -> Manifest:
        """The committed manifest of a cache. Raises CacheError: absent, damaged, of another version, or with the name
        of a group or a file that no cache has (UnsafeNameError).
        """
        path = inside(cache, MANIFEST_FILE)
        try:
            content = json.loads(storage.read_bytes(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            what = "is not there" if not storage.exists(cache) else f"holds no committed cache (no {MANIFEST_FILE})"
            raise CacheError(
                f"{cache} {what}; run {command('preprocess')} with --output_path {cache} to its end, "
                "and give stage 2 that folder as --dataset_base_path"
            ) from error
        except OSError as error:
            raise UnreadableError(path, error) from error
        except (ValueError, RecursionError) as error:
            raise CacheError(f"{path} is damaged ({error}); {repair_advice(cache)}") from error
        version = content.get("version") if isinstance(content, dict) else None
        if isinstance(version, int) and version not in READABLE_VERSIONS:
            raise VersionError(path, version, MANIFEST_VERSION)
        try:
            if version not in READABLE_VERSIONS:
                raise ValueError(f"version is {version!r}")
            manifest = cls.from_dict(content)
            manifest.check_names(path)
            if manifest.dtype not in DTYPES:
                raise ValueError(f"dtype is {manifest.dtype!r}")
            return manifest
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CacheError(f"{path} is damaged ({type(error).__name__}: {error}); {repair_advice(cache)}") from error

    def check_names(self, where: str) -> None:
        """Raise UnsafeNameError for a name that no file or folder of a cache has, ValueError for none at all.

        `where` the manifest stands.
        """
        names = [group.name for group in self.groups]
        if not (self.index_file and self.quarantine_file) or len(set(names)) != len(names):
            raise ValueError("it names no index, no quarantine, or a group twice")
        for group in self.groups:
            check_group(group.name, where)
            if group.empty_at is not None:
                check_shard(group.empty_at[0], where)
        check_table(self.index_file, INDEX_FOLDER, where)
        check_table(self.quarantine_file, QUARANTINE_FOLDER, where)

    def hash(self) -> str:
        """Hex blake2b-128 of the content."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def identity(self, index: pa.Table) -> str:
        """Hex blake2b-128 of what is trained on: two caches with the same one give the same training.

        Where rows lie, what else the files hold and who is in quarantine does not count.
        """
        names = ("family", "task", "trainable", "parameters", "dtype")
        facts = {name: getattr(self, name) for name in names}
        if self.version == 2:  # its runs go on: the field was always there, and empty
            facts["settings"] = {}
        groups = [(group.name, group.parameters, group.fingerprint, group.empty_key) for group in self.groups]
        whole = hashlib.blake2b(json.dumps([facts, groups], sort_keys=True).encode(), digest_size=16)
        for name in ("sample_id", "bucket", *(f"{group.name}_key" for group in self.groups)):
            _add_strings(whole, index.column(name))
        return whole.hexdigest()

    def group(self, name: str) -> GroupSpec:
        """The group of that name. Raises CacheError."""
        for group in self.groups:
            if group.name == name:
                return group
        raise CacheError(f"the cache has no group {name!r}; its groups are {', '.join(g.name for g in self.groups)}")

    def read_index(self, cache: str) -> pa.Table:
        """The index, a row per sample in training order.

        Raises CacheError if it is absent or not the committed one, UnsafeNameError if it names what is no shard.
        """
        schema = index_schema(group.name for group in self.groups)
        whole = schema.append(pa.field(CAPTION, pa.string()))
        table = read_table(cache, self.index_file, self.index_hash, whole, schema.names)
        if {name: len(rows) for name, rows in bucket_ranges(table).items()} != self.buckets:
            raise CacheError(f"the index {self.index_file} of {cache} has other buckets than its manifest")
        _check_places(table, self.groups, storage.join(cache, self.index_file))
        return table

    def read_captions(self, cache: str) -> list[str | None]:
        """The caption of each index row. Raises CacheError."""
        schema = index_schema(group.name for group in self.groups).append(pa.field(CAPTION, pa.string()))
        table = read_table(cache, self.index_file, self.index_hash, schema, [CAPTION])
        captions: list[str | None] = table.column(CAPTION).to_pylist()
        return captions

    def read_quarantine(self, cache: str) -> pa.Table:
        """The samples that were left out, with their reasons. Raises CacheError."""
        # The name is the hash as well, so that the quarantine needs no field of its own for it.
        digest = self.quarantine_file.rpartition("/")[2].removesuffix(".parquet")
        return read_table(cache, self.quarantine_file, digest, QUARANTINE_SCHEMA)


CAPTION = "caption"
"""A further column of the index, for people: the caption, null where there is none. No reader keeps it."""


def index_schema(groups: Iterable[str]) -> pa.Schema:
    """sample_id, source, bucket, then key, file, row group and row in each group."""
    columns = [(name, pa.string()) for name in ("sample_id", "source", "bucket")]
    for group in groups:
        columns += [(f"{group}_key", pa.string()), (f"{group}_file", pa.string())]
        columns += [(f"{group}_row_group", pa.int32()), (f"{group}_row", pa.int32())]
    return pa.schema(columns)


def bucket_ranges(index: pa.Table) -> dict[str, range]:
    """Bucket -> its rows in the index. Raises CacheError when a bucket's rows are not together."""
    ranges: dict[str, range] = {}
    if not index.num_rows:
        return ranges
    runs = pc.run_end_encode(index.column("bucket").combine_chunks())
    start = 0
    for run in runs.chunks if isinstance(runs, pa.ChunkedArray) else [runs]:
        for end, name in zip(run.run_ends.to_pylist(), run.values.to_pylist(), strict=True):
            if name in ranges:
                raise CacheError(f"the rows of bucket {name} are not together in the index; sort it by bucket first")
            ranges[name] = range(start, end)
            start = end
    return ranges


def _add_strings(digest: Any, column: pa.ChunkedArray) -> None:
    """Add the lengths of a column's strings, then the strings."""
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    for chunk in chunks:
        digest.update(pc.binary_length(chunk).to_numpy(zero_copy_only=False).astype("<i4").tobytes())
    for chunk in chunks:
        ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        digest.update(memoryview(chunk.buffers()[2] or b"")[ends[0] : ends[-1]])


def committed(cache: str) -> tuple[Manifest, pa.Table]:
    """Manifest and index of a committed cache. Raises CacheError.

    Between the two reads another process may commit, and remove the index of the manifest that was read: then they are
    read again.
    """
    manifest = Manifest.load(cache)
    while True:
        try:
            return manifest, manifest.read_index(cache)
        except CacheError:
            newer = Manifest.load(cache)
            if newer == manifest:
                raise
            manifest = newer


def _check_places(index: pa.Table, groups: Iterable[GroupSpec], where: str) -> None:
    """Raise UnsafeNameError for an index that names what is no shard, CacheError for a place that cannot be."""
    if empty := [name for name in index.column_names if name != "source" and index.column(name).null_count]:
        raise CacheError(f"{where} has no {empty[0]} for some sample; it is damaged")
    for group in groups:
        check_shards(pc.unique(index.column(f"{group.name}_file")).to_pylist(), where)
        for name in ("row_group", "row"):
            if index.num_rows and pc.min(index.column(f"{group.name}_{name}")).as_py() < 0:
                raise CacheError(f"{where} has a negative {name} in the group {group.name}; it is damaged")


def _check(manifest: Manifest, index: pa.Table, quarantine: pa.Table) -> None:
    """Raise CacheError unless every sample is in the index or in quarantine, once; before anything is written."""
    counts = manifest.counts
    if counts["samples"] != index.num_rows or counts["quarantined"] != quarantine.num_rows:
        raise CacheError(
            f"the manifest counts {counts['samples']} samples and {counts['quarantined']} quarantined, "
            f"its tables have {index.num_rows} and {quarantine.num_rows}"
        )
    if counts["samples"] + counts["quarantined"] != counts["total"]:
        raise CacheError(
            f"{counts['samples']} samples and {counts['quarantined']} quarantined do not add up to {counts['total']}"
        )
    if len(pc.unique(index.column("sample_id"))) != index.num_rows:
        raise CacheError("a sample_id stands twice in the index")
    if index.num_rows and any(index.column(name).null_count for name in index.column_names if name != "source"):
        raise CacheError("the index has a row without a location in some group")
    ranges = {name: len(rows) for name, rows in bucket_ranges(index).items()}
    if list(ranges.items()) != list(manifest.buckets.items()):
        raise CacheError(f"the manifest has the buckets {manifest.buckets}, its index {ranges}")
    for group in manifest.groups:
        if group.empty_key is not None and group.empty_at is None:
            what = f"an empty caption {group.empty_key}"
            raise CacheError(f"the group {group.name} has {what} but no place of it (empty_at)")


def commit(
    cache: str,
    manifest: Manifest,
    index: pa.Table,
    quarantine: pa.Table,
    captions: Sequence[str | None] | None = None,
) -> Manifest:
    """Make a cache readable: write index and quarantine under the names of their hashes, then manifest.json.

    A crash before the last rename leaves the manifest that was there; index and quarantine tables that the new one does
    not name are removed afterwards, those of an interrupted commit among them. The shards must be written. `captions`:
    one an index row. Returns the manifest with its files filled in. Raises CacheError when counts, buckets and tables
    do not add up, UnsafeNameError for names that no cache has and for a folder that is a link out of it.
    """
    columns = index_schema(group.name for group in manifest.groups)
    index = index.select(columns.names).cast(columns).combine_chunks()
    for name in set(QUARANTINE_SCHEMA.names) - set(quarantine.column_names):
        quarantine = quarantine.append_column(name, pa.nulls(quarantine.num_rows, pa.string()))
    quarantine = quarantine.select(QUARANTINE_SCHEMA.names).cast(QUARANTINE_SCHEMA).combine_chunks()
    _check(manifest, index, quarantine)
    texts = pa.nulls(index.num_rows, pa.string()) if captions is None else pa.array(captions, pa.string())
    index_data, quarantine_data = table_bytes(index.append_column(CAPTION, texts)), table_bytes(quarantine)
    digest = table_hash(index_data)
    whole = replace(
        manifest,
        index_file=f"{INDEX_FOLDER}/{digest}.parquet",
        index_hash=digest,
        quarantine_file=f"{QUARANTINE_FOLDER}/{table_hash(quarantine_data)}.parquet",
    )
    whole.check_names(cache)
    _check_places(index, manifest.groups, cache)
    for folder in (INDEX_FOLDER, QUARANTINE_FOLDER):
        inside(cache, folder)
    storage.write_bytes_atomic(storage.join(cache, whole.index_file), index_data)
    storage.write_bytes_atomic(storage.join(cache, whole.quarantine_file), quarantine_data)
    text = json.dumps(whole.to_dict(), indent=2, ensure_ascii=False) + "\n"
    storage.write_bytes_atomic(storage.join(cache, MANIFEST_FILE), text.encode())
    for path in old_tables(cache, whole):
        storage.remove(path)
    return whole


def old_tables(cache: str, manifest: Manifest) -> Iterator[str]:
    """Index and quarantine files that the manifest does not name. Raises UnsafeNameError."""
    for folder, kept in ((INDEX_FOLDER, manifest.index_file), (QUARANTINE_FOLDER, manifest.quarantine_file)):
        for file in storage.list_files(inside(cache, folder), suffix=".parquet"):
            if is_table(file) and f"{folder}/{file}" != kept:
                yield inside(cache, folder, file)
