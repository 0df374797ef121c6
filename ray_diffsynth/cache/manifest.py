"""What a committed cache is: `manifest.json`, and the index and quarantine that it names in parts, by their hashes.

Whatever lies in the folder besides what a committed manifest names does not exist for a reader.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from ray_diffsynth import storage
from ray_diffsynth.cache.errors import CacheError, UnreadableError, VersionError, repair_advice
from ray_diffsynth.cache.index import CAPTION, QUARANTINE_SCHEMA, add_strings, bucket_ranges, check_places, index_schema
from ray_diffsynth.cache.names import (
    INDEX_FOLDER,
    QUARANTINE_FOLDER,
    check_group,
    check_shard,
    check_table,
    inside,
)
from ray_diffsynth.cache.tables import Part, read_parts
from ray_diffsynth.program import command

MANIFEST_VERSION = 4
"""4: index and quarantine are in parts; 3: keys stand on stated versions, not on hashes of code; 2: the rows' checksums
are XXH3-64 (1: CRC-32)."""
READABLE_VERSIONS = (2, 3, 4)
"""Training reads all alike."""
SAME_KEYS = (3, 4)
"""Versions whose keys are made as stage 1 makes its own: it goes on with their rows, and commits the newest."""
IN_ONE_FILE = (2, 3)
"""Versions that have the index, and the quarantine, in one file."""
MANIFEST_FILE = "manifest.json"
DTYPES = ("bfloat16", "float32", "float16")
"""In which encoders run."""


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

    `commit` fills in the parts of index and quarantine, each in the order of its rows. No times and no host names: the
    same cache has the same manifest and the same `hash`. `version` is that of the file.
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
    index_parts: tuple[Part, ...] = ()
    quarantine_parts: tuple[Part, ...] = ()
    version: int = MANIFEST_VERSION

    def to_dict(self) -> dict[str, Any]:
        """For JSON, as its version has it; `version` first, buckets in their order."""
        content = {"version": self.version} | asdict(self)
        if self.version in IN_ONE_FILE:
            (index,), (quarantine,) = self.index_parts, self.quarantine_parts
            del content["index_parts"], content["quarantine_parts"]
            content |= {"index_file": index.file, "index_hash": index.hash, "quarantine_file": quarantine.file}
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Manifest:
        """The inverse of `to_dict`. Raises TypeError or KeyError for absent or unknown fields."""
        values = dict(content)
        if values["version"] == 2 and values.get("settings") == {}:  # nothing was ever in it
            del values["settings"]
        if values["version"] in IN_ONE_FILE:
            _as_parts(values)
        for name in ("index_parts", "quarantine_parts"):
            values[name] = tuple(Part(**part) for part in values[name])
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
            if content.get("index_hash") not in (None, manifest.index_parts[0].hash):
                raise ValueError(f"index_hash is {content['index_hash']!r}, which is not the name of the index")
            if manifest.dtype not in DTYPES:
                raise ValueError(f"dtype is {manifest.dtype!r}")
            return manifest
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CacheError(f"{path} is damaged ({type(error).__name__}: {error}); {repair_advice(cache)}") from error

    def check_names(self, where: str) -> None:
        """Raise UnsafeNameError for a name that no file or folder of a cache has, ValueError for none at all.

        `where` the manifest stands.
        """
        if not (self.index_parts and self.quarantine_parts):
            raise ValueError("it names no index or no quarantine")
        self.check_groups(where)
        for parts, folder in ((self.index_parts, INDEX_FOLDER), (self.quarantine_parts, QUARANTINE_FOLDER)):
            for part in parts:
                check_table(part.file, folder, where)

    def check_groups(self, where: str) -> None:
        """`check_names`, of the groups alone."""
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError("it names a group twice")
        for group in self.groups:
            check_group(group.name, where)
            if group.empty_at is not None:
                check_shard(group.empty_at[0], where)

    def tables(self) -> list[str]:
        """The files of index and quarantine, relative to the cache."""
        return [part.file for part in (*self.index_parts, *self.quarantine_parts)]

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
            add_strings(whole, index.column(name))
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
        table = read_parts(cache, self.index_parts, schema.append(pa.field(CAPTION, pa.string())), schema.names)
        where = storage.join(cache, INDEX_FOLDER)
        if {name: len(rows) for name, rows in bucket_ranges(table).items()} != self.buckets:
            raise CacheError(f"the index {where} has other buckets than the manifest of the cache")
        check_places(table, [group.name for group in self.groups], where)
        return table

    def read_captions(self, cache: str) -> list[str | None]:
        """The caption of each index row. Raises CacheError."""
        schema = index_schema(group.name for group in self.groups).append(pa.field(CAPTION, pa.string()))
        table = read_parts(cache, self.index_parts, schema, [CAPTION])
        captions: list[str | None] = table.column(CAPTION).to_pylist()
        return captions

    def read_quarantine(self, cache: str) -> pa.Table:
        """The samples that were left out, with their reasons. Raises CacheError."""
        return read_parts(cache, self.quarantine_parts, QUARANTINE_SCHEMA)


def _as_parts(values: dict[str, Any]) -> None:
    """Replace, in place, the fields of a manifest that names one file of each table."""
    index, quarantine = values.pop("index_file"), values.pop("quarantine_file")
    del values["index_hash"]  # which its name is
    values["index_parts"] = [{"file": index, "rows": values["counts"]["samples"]}]
    values["quarantine_parts"] = [{"file": quarantine, "rows": values["counts"]["quarantined"]}]


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
