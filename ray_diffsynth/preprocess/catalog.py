"""What a cache already holds: rows of the manifest, and shards that an interrupted run finished but did not commit."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from ray_diffsynth.cache.errors import CacheError, UnreadableError
from ray_diffsynth.cache.manifest import MANIFEST_FILE, GroupSpec, Manifest, committed
from ray_diffsynth.cache.names import UnsafeNameError
from ray_diffsynth.cache.row_warnings import RowWarnings, read_warnings
from ray_diffsynth.cache.store import Shard, list_shards, read_shard_header, shard_name
from ray_diffsynth.preprocess.key_columns import Keys, Mask, is_among, packed, packed_column, positions, unpacked
from ray_diffsynth.preprocess.locations import Locations, Places
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.shard_plans import ShardPlans
from ray_diffsynth.storage import exists, file_sizes, join

logger = logging.getLogger(__name__)

HEADER_THREADS = 16


@dataclass
class GroupCatalog:
    """Known rows of one group by key, and the keys whose sample failed to encode.

    failures: of those that are stored nevertheless, by another shard, they do not count.
    transient: those that could not be tried in this run (a file that could not be read); the next one tries again.
    warnings: those of a row, by key. run_warnings: those of this run and of no row, as (kind, detail).
    """

    locations: Locations = field(default_factory=Locations)
    failures: dict[str, Failure] = field(default_factory=dict)
    transient: dict[str, Failure] = field(default_factory=dict)
    warnings: dict[str, RowWarnings] = field(default_factory=dict)
    run_warnings: set[tuple[str, str]] = field(default_factory=set)

    def failure(self, key: str) -> Failure | None:
        """Why the sample of a key is not stored; None for one that is, or was not tried."""
        return None if key in self.locations else self.failures.get(key) or self.transient.get(key)

    def failed(self, keys: Keys) -> Mask:
        """Which of the keys have a `failure`."""
        if not (self.failures or self.transient):
            return np.zeros(len(keys), bool)
        return is_among(keys, (*self.failures, *self.transient)) & (self.locations.find(keys) < 0)

    def knows(self, keys: Keys) -> Mask:
        """Which of the keys need no encoding: stored, or failed before with the very same inputs."""
        stored = self.locations.find(keys) >= 0
        return stored | is_among(keys, self.failures) if self.failures else stored

    def add(self, shard: Shard) -> None:
        """Take in a written shard."""
        row_groups, rows = np.divmod(np.arange(len(shard.keys)), shard.rows_per_group)
        self.locations.add(packed(shard.keys), shard.file, row_groups, rows)
        if self.failures:
            for key in shard.keys:
                self.failures.pop(key, None)  # it failed before, and was tried again
        self.warnings.update(shard.warnings)
        self.failures.update((key, Failure(*reason)) for key, reason in shard.failed.items())


def committed_state(cache: str) -> tuple[Manifest | None, pa.Table | None]:
    """The cache's manifest and index; None for both where there is none yet. A damaged one raises CacheError."""
    return committed(cache) if exists(join(cache, MANIFEST_FILE)) else (None, None)


def committed_rows(
    cache: str, manifest: Manifest | None, index: pa.Table | None, group: str, *, retry: bool = False
) -> GroupCatalog:
    """Rows and failures of `group` that the manifest names. Keys are content addresses, so they hold for any later run.

    Rows whose file is gone or cut short are left out, so that they are encoded again. With `retry` the failures are
    left out, so that they are tried again.
    """
    catalog = GroupCatalog()
    if manifest is None or index is None:
        return catalog
    spec = next((item for item in manifest.groups if item.name == group), None)
    if spec is not None:
        keys, files, row_groups, rows = (index[f"{group}_{name}"] for name in ("key", "file", "row_group", "row"))
        catalog.locations.add_columns(packed_column(keys), files, row_groups.to_numpy(), rows.to_numpy())
        if spec.empty_key is not None and spec.empty_at is not None:
            file, row_group, row = spec.empty_at
            catalog.locations.add(packed([spec.empty_key]), file, [row_group], [row])
        _forget_lost(cache, spec, catalog.locations)
        catalog.warnings.update(read_warnings(cache).get(group, {}))
    for entry in [] if retry else manifest.read_quarantine(cache).to_pylist():
        if entry["group"] == group and entry["key"] is not None:
            catalog.failures[entry["key"]] = Failure(entry["error"], entry["message"])
    return catalog


def _forget_lost(cache: str, spec: GroupSpec, locations: Locations) -> None:
    """Drop the locations that hold no such row any more. One listing; headers are read only if it is not as it was."""
    named, sizes = set(locations.files), file_sizes(join(cache, spec.name))
    if named <= sizes.keys() and sum(sizes[file] for file in named) == spec.nbytes:
        return
    headers = _headers(cache, spec.name, sorted(named & sizes.keys()))
    kept = np.zeros(len(locations), bool)
    lost = []
    for file, numbers in locations.by_file():
        kept[numbers] = _held(headers.get(file), locations.places[numbers, 1:], locations.keys[numbers])
        if not kept[numbers].all():
            lost.append(file)
    if lost:
        logger.warning(
            "%s: %d files are gone or damaged, the first %s; their %d rows are encoded again",
            *(join(cache, spec.name), len(lost), min(lost), int((~kept).sum())),
        )
        locations.keep(kept)


def _held(shard: Shard | None, places: Places, keys: Keys) -> Mask:
    """Which of the keys a file has at their places."""
    if shard is None or not shard.keys:
        return np.zeros(len(keys), bool)
    at = places[:, 0].astype(np.int64) * shard.rows_per_group + places[:, 1]
    there = at < len(shard.keys)
    held: Mask = there & (packed(shard.keys)[np.where(there, at, 0)] == keys)
    return held


def recover(cache: str, group: str, shards: ShardPlans, catalog: GroupCatalog, *, retry: bool = False) -> ShardPlans:
    """Take finished but uncommitted shards into `catalog`; returns the shards that are still to be encoded.

    A file of a planned shard's name is that shard, since the name is the hash of its keys. Other files come from a run
    over other rows; what they hold of the wanted keys is used too. With `retry` their failures are not.
    """
    # Committed files too: they may hold rows of samples that left the index and came back.
    known = _fully_named(catalog.locations) if len(shards) else set()
    files = [file for file in list_shards(cache, group) if file not in known] if len(shards) else []
    if not files:
        return shards
    planned = {f"{name}.parquet" for name in shards.names()}
    wanted = np.sort(shards.keys)
    for _, shard in sorted(_headers(cache, group, files).items(), key=lambda item: item[0] not in planned):
        if shard is not None and (positions(packed((*shard.keys, *shard.failed)), wanted) >= 0).any():
            catalog.add(replace(shard, failed={}) if retry else shard)
    return shards.without(catalog.knows(shards.keys))


def _fully_named(locations: Locations) -> set[str]:
    """Files of which every row is known: their name is the hash of just these keys."""
    keys = locations.keys
    return {file for file, rows in locations.by_file() if file == f"{shard_name(unpacked(keys[rows]))}.parquet"}


def _headers(cache: str, group: str, files: Iterable[str]) -> dict[str, Shard | None]:
    """File -> what it says it holds; None for one that cannot be used. Raises UnreadableError, UnsafeNameError."""
    files = list(files)
    with ThreadPoolExecutor(max_workers=HEADER_THREADS) as pool:
        return dict(zip(files, pool.map(lambda file: _header(cache, group, file), files), strict=True))


def _header(cache: str, group: str, file: str) -> Shard | None:
    try:
        return read_shard_header(cache, group, file)
    except (UnreadableError, UnsafeNameError):
        raise  # not to be taken for lost: encoding all of it again would cost more than another start
    except CacheError as error:
        logger.warning("%s; its rows are encoded again", error)
        return None
