"""What a cache already holds: rows of the manifest, and shards that an interrupted run finished but did not commit."""

import logging
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pyarrow as pa

from ray_diffsynth.cache.errors import CacheError, UnreadableError
from ray_diffsynth.cache.manifest import MANIFEST_FILE, GroupSpec, Manifest, committed
from ray_diffsynth.cache.names import UnsafeNameError
from ray_diffsynth.cache.row_warnings import RowWarnings, read_warnings
from ray_diffsynth.cache.store import Shard, list_shards, read_shard_header, shard_name
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.shards import ShardPlan, remaining
from ray_diffsynth.storage import exists, file_sizes, join

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
    """Known rows of one group by key, and the keys whose sample failed to encode.

    transient: those that could not be tried in this run (a file that could not be read); the next one tries again.
    warnings: those of a row, by key. run_warnings: those of this run and of no row, as (kind, detail).
    """

    locations: dict[str, Location] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    transient: dict[str, Failure] = field(default_factory=dict)
    warnings: dict[str, RowWarnings] = field(default_factory=dict)
    run_warnings: set[tuple[str, str]] = field(default_factory=set)

    def failure(self, key: str) -> Failure | None:
        """Why the sample of a key is not stored; None for one that is, or was not tried."""
        return None if key in self.locations else self.failures.get(key) or self.transient.get(key)

    def has_failures(self) -> bool:
        """Whether any row is known not to be stored."""
        return bool(self.failures or self.transient)

    def known(self) -> set[str]:
        """Keys that need no encoding: stored, or failed before with the very same inputs."""
        return {*self.locations, *self.failures}

    def add(self, shard: Shard) -> None:
        """Take in a written shard."""
        for row, key in enumerate(shard.keys):
            self.locations.setdefault(key, Location(shard.file, *shard.locate(row)))
            self.failures.pop(key, None)  # it failed before, and was tried again
        self.warnings.update(shard.warnings)
        failed = ((key, Failure(*reason)) for key, reason in shard.failed.items() if key not in self.locations)
        self.failures.update(failed)


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
        columns = (index[f"{group}_{name}"].to_pylist() for name in ("key", "file", "row_group", "row"))
        files: dict[str, str] = {}  # one string for all rows of a file
        for key, file, row_group, row in zip(*columns, strict=True):
            catalog.locations[key] = Location(files.setdefault(file, file), row_group, row)
        if spec.empty_key is not None and spec.empty_at is not None:
            catalog.locations[spec.empty_key] = Location(*spec.empty_at)
        _forget_lost(cache, spec, catalog)
        catalog.warnings.update(read_warnings(cache).get(group, {}))
    for row in [] if retry else manifest.read_quarantine(cache).to_pylist():
        if row["group"] == group and row["key"] not in catalog.locations:
            catalog.failures[row["key"]] = Failure(row["error"], row["message"])
    return catalog


def _forget_lost(cache: str, spec: GroupSpec, catalog: GroupCatalog) -> None:
    """Drop the locations that hold no such row any more. One listing; headers are read only if it is not as it was."""
    named = {place.file for place in catalog.locations.values()}
    sizes = file_sizes(join(cache, spec.name))
    if named <= sizes.keys() and sum(sizes[file] for file in named) == spec.nbytes:
        return
    headers = _headers(cache, spec.name, sorted(named & sizes.keys()))
    lost = [key for key, place in catalog.locations.items() if not _holds(headers.get(place.file), place, key)]
    files = sorted({catalog.locations[key].file for key in lost})
    for key in lost:
        del catalog.locations[key]
    if lost:
        logger.warning(
            "%s: %d files are gone or damaged, the first %s; their %d rows are encoded again",
            *(join(cache, spec.name), len(files), files[0], len(lost)),
        )


def _holds(shard: Shard | None, place: Location, key: str) -> bool:
    if shard is None:
        return False
    position = place.row_group * shard.rows_per_group + place.row
    return position < len(shard.keys) and shard.keys[position] == key


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
    known = _fully_named(catalog) if open_shards else set()
    files = [file for file in list_shards(cache, group) if file not in known] if open_shards else []
    for file, shard in sorted(_headers(cache, group, files).items(), key=lambda item: item[0] not in open_shards):
        if shard is not None and not wanted.isdisjoint({*shard.keys, *shard.failed}):
            catalog.add(replace(shard, failed={}) if retry else shard)
            if not (retry and shard.failed):
                open_shards.pop(file, None)
    done = catalog.known()
    return [rest for shard in open_shards.values() if (rest := remaining(shard, done)) is not None]


def _fully_named(catalog: GroupCatalog) -> set[str]:
    """Files of which every row is known: their name is the hash of just these keys."""
    rows: defaultdict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for key, place in catalog.locations.items():
        rows[place.file].append((place.row_group, place.row, key))
    return {file for file, found in rows.items() if file == f"{shard_name([row[2] for row in sorted(found)])}.parquet"}


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
