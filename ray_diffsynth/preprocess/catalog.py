"""What a cache already holds: rows of the manifest, and shards that an interrupted run finished but did not commit."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pyarrow as pa

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.manifest import MANIFEST_FILE, Manifest
from ray_diffsynth.cache.store import Shard, list_shards, read_shard_header
from ray_diffsynth.data.storage import exists, join
from ray_diffsynth.preprocess.scan import Failure
from ray_diffsynth.preprocess.shards import ShardPlan, remaining

logger = logging.getLogger(__name__)

HEADER_THREADS = 16


@dataclass(frozen=True, slots=True)
class Location:
    """Where a row lies: a Parquet file of its group's folder, its row group, and the row in it."""

    file: str
    row_group: int
    row: int


@dataclass
class GroupCatalog:
    """Known rows of one group by key, and the keys whose sample failed to encode."""

    locations: dict[str, Location] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)

    def known(self) -> set[str]:
        """Keys that need no encoding: stored, or failed before with the very same inputs."""
        return {*self.locations, *self.failures}

    def add(self, shard: Shard) -> None:
        """Take in a written shard."""
        for row, key in enumerate(shard.keys):
            self.locations.setdefault(key, Location(shard.file, *shard.locate(row)))
            self.failures.pop(key, None)  # it failed before, and was tried again
        failed = ((key, Failure(*reason)) for key, reason in shard.failed.items() if key not in self.locations)
        self.failures.update(failed)


def committed_manifest(cache: str) -> Manifest | None:
    """The cache's manifest; None where there is none yet. A damaged one raises CacheError."""
    return Manifest.load(cache) if exists(join(cache, MANIFEST_FILE)) else None


def committed_rows(
    cache: str, manifest: Manifest | None, index: pa.Table | None, group: str, *, retry: bool = False
) -> GroupCatalog:
    """Rows and failures of `group` that the manifest names. Keys are content addresses, so they hold for any later run.

    With `retry` the failures are left out, so that they are tried again.
    """
    catalog = GroupCatalog()
    if manifest is None or index is None:
        return catalog
    spec = next((item for item in manifest.groups if item.name == group), None)
    if spec is not None:
        columns = (index[f"{group}_{name}"].to_pylist() for name in ("key", "file", "row_group", "row"))
        for key, *place in zip(*columns, strict=True):
            catalog.locations[key] = Location(*place)
        if spec.empty_key is not None and spec.empty_at is not None:
            catalog.locations[spec.empty_key] = Location(*spec.empty_at)
    for row in [] if retry else manifest.read_quarantine(cache).to_pylist():
        if row["group"] == group and row["key"] not in catalog.locations:
            catalog.failures[row["key"]] = Failure(row["error"], row["message"])
    return catalog


def recover(
    cache: str, group: str, shards: Iterable[ShardPlan], catalog: GroupCatalog, *, retry: bool = False
) -> list[ShardPlan]:
    """Take finished but uncommitted shards into `catalog`; returns the shards that are still to be encoded.

    A file of a planned shard's name is that shard, since the name is the hash of its keys. Other files come from a run
    over other rows; what they hold of the wanted keys is used too. With `retry` their failures are not.
    """
    open_shards = {f"{shard.name}.parquet": shard for shard in shards}
    wanted = {key for shard in open_shards.values() for key in shard.keys}
    # Committed files too: they may hold rows of samples that left the index and came back.
    files = list_shards(cache, group) if open_shards else []
    with ThreadPoolExecutor(max_workers=HEADER_THREADS) as pool:
        headers = list(pool.map(lambda file: _header(cache, group, file), files))
    for file, shard in sorted(zip(files, headers, strict=True), key=lambda item: item[0] not in open_shards):
        if shard is not None and not wanted.isdisjoint({*shard.keys, *shard.failed}):
            catalog.add(replace(shard, failed={}) if retry else shard)
            if not (retry and shard.failed):
                open_shards.pop(file, None)
    done = catalog.known()
    return [rest for shard in open_shards.values() if (rest := remaining(shard, done)) is not None]


def _header(cache: str, group: str, file: str) -> Shard | None:
    try:
        return read_shard_header(cache, group, file)
    except CacheError as error:
        logger.warning("%s; its rows are encoded again", error)
        return None
