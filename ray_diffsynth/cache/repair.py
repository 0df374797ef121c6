"""Bring a damaged cache to a state from which stage 1 encodes only what is lost; drop what nothing points to.

Rows are addressed by content, so nothing is patched: what cannot be trusted is removed, and if the manifest named it,
the manifest goes too. Stage 2 then refuses the cache until stage 1 has run again, which finds all remaining rows by
their keys.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.parquet as pq

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.inspection import Place, named_rows, orphans
from ray_diffsynth.cache.lease import lease
from ray_diffsynth.cache.manifest import (
    INDEX_FOLDER,
    MANIFEST_FILE,
    MANIFEST_VERSION,
    QUARANTINE_FOLDER,
    GroupSpec,
    Manifest,
    commit,
)
from ray_diffsynth.cache.store import list_shards, read_shard_header, shard_header, shard_name, shard_path, write_shard
from ray_diffsynth.cache.verify import file_problem
from ray_diffsynth.data import storage


@dataclass
class Repair:
    """What was done: removed paths with the reason, files written anew without unused rows, and the state after it."""

    removed: list[tuple[str, str]] = field(default_factory=list)
    compacted: list[str] = field(default_factory=list)
    committed: bool = True
    """False: the cache must be completed by jobs/preprocess.py before it can be trained on."""

    def remove(self, path: str, reason: str) -> None:
        if storage.remove(path):
            self.removed.append((path, reason))


def repair_cache(cache: str, *, prune: bool = False) -> Repair:
    """Remove what is damaged or unfinished, with `prune` also what nothing points to.

    Raises CacheError while another process writes to the cache, if nothing of a cache is there, and for a cache of a
    newer version.
    """
    cache = storage.absolute(cache)
    if not storage.exists(cache):
        raise CacheError(f"{cache} is not there")
    done = Repair()
    with lease(cache):
        groups = [name for name in storage.list_folders(cache) if name not in (INDEX_FOLDER, QUARANTINE_FOLDER)]
        for folder in (cache, *(storage.join(cache, name) for name in (INDEX_FOLDER, QUARANTINE_FOLDER, *groups))):
            for path in storage.list_unfinished(folder):
                done.remove(path, "a write that never ended")
        manifest, index = _readable(cache, done)
        specs = {} if manifest is None else {spec.name: spec for spec in manifest.groups}
        for group in groups:
            named: dict[str, list[Place]] = {}
            if group in specs and index is not None:
                named = named_rows(index, specs[group])
                for file, places in named.items():
                    if problem := file_problem(cache, specs[group], file, places):
                        done.remove(shard_path(cache, group, file), problem)
                        done.committed = False
            _check_spare(cache, group, named, done)
        if not done.committed:
            _uncommit(cache, manifest, done)
        elif prune and manifest is not None and index is not None:
            _prune(cache, manifest, index, groups, done)
    return done


def _readable(cache: str, done: Repair) -> tuple[Manifest | None, pa.Table | None]:
    """Manifest and index, or None for both when there is none that can be trusted."""
    path = storage.join(cache, MANIFEST_FILE)
    if not storage.exists(path):
        done.committed = False
        return None, None
    manifest = None
    try:
        manifest = Manifest.load(cache)
        manifest.read_quarantine(cache)
        return manifest, manifest.read_index(cache)
    except CacheError as error:
        if _version(path) > MANIFEST_VERSION:
            raise
        done.committed = False
        done.remove(path, str(error))
        return manifest, None


def _version(path: str) -> int:
    try:
        return int(json.loads(storage.read_bytes(path))["version"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def _check_spare(cache: str, group: str, named: dict[str, list[Place]], done: Repair) -> None:
    """Remove damaged files that no manifest names: a rerun would stumble over them and encode their rows anyway."""
    for file in list_shards(cache, group):
        if file not in named:
            try:
                read_shard_header(cache, group, file, verify=True)
            except CacheError as error:
                done.remove(shard_path(cache, group, file), str(error))


def _uncommit(cache: str, manifest: Manifest | None, done: Repair) -> None:
    """Take the manifest away, then the tables that only it named."""
    reason = "what it names is damaged; jobs/preprocess.py writes a new one"
    done.remove(storage.join(cache, MANIFEST_FILE), reason)
    for file in () if manifest is None else (manifest.index_file, manifest.quarantine_file):
        done.remove(storage.join(cache, file), reason)


def _prune(cache: str, manifest: Manifest, index: pa.Table, groups: list[str], done: Repair) -> None:
    """Write files anew that hold rows which nothing names, commit, then remove what the new manifest does not name."""
    specs = []
    for spec in manifest.groups:
        moved = {file: _compact(cache, spec, file, places) for file, places in named_rows(index, spec).items()}
        moved = {file: new for file, new in moved.items() if new[0] != file}
        done.compacted += [shard_path(cache, spec.name, file) for file in moved]
        index, spec = _relocated(index, spec, moved)
        files = named_rows(index, spec)
        nbytes = sum(storage.file_size(shard_path(cache, spec.name, file)) for file in files)
        specs.append(replace(spec, nbytes=nbytes))
    if done.compacted:
        captions = manifest.read_captions(cache)
        quarantine = manifest.read_quarantine(cache)
        manifest = commit(cache, replace(manifest, groups=tuple(specs)), index, quarantine, captions)
    reason = "nothing points to it"
    for spec in specs:
        for file in orphans(cache, spec, named_rows(index, spec)):
            done.remove(shard_path(cache, spec.name, file), reason)
    for group in set(groups) - {spec.name for spec in specs}:
        for file in list_shards(cache, group):
            done.remove(shard_path(cache, group, file), reason)
    for folder, kept in ((INDEX_FOLDER, manifest.index_file), (QUARANTINE_FOLDER, manifest.quarantine_file)):
        for file in list_shards(cache, folder):
            if f"{folder}/{file}" != kept:
                done.remove(storage.join(cache, folder, file), reason)


def _compact(cache: str, spec: GroupSpec, file: str, places: list[Place]) -> tuple[str, dict[tuple[int, int], Place]]:
    """A file with only the rows at `places`: its name, and where each row went. The file itself if it has no others."""
    with storage.open_input(shard_path(cache, spec.name, file)) as source, pq.ParquetFile(source) as parquet:
        header = shard_header(parquet)
        if parquet.metadata.num_rows == len(places):
            return file, {}
        table = parquet.read()
    # In the order of the table: places are sorted by row group and row.
    positions = [row_group * header["rows_per_group"] + row for row_group, row, _ in places]
    keys = [key for _, _, key in places]
    rows = table.take(positions).combine_chunks()
    written = write_shard(cache, spec.name, shard_name(keys), header["bucket"], rows, codec=header["codec"])
    target = {place[:2]: (*written.locate(at), place[2]) for at, place in enumerate(places)}
    return written.file, target


def _relocated(
    index: pa.Table, spec: GroupSpec, moved: dict[str, tuple[str, dict[tuple[int, int], Place]]]
) -> tuple[pa.Table, GroupSpec]:
    """Index and group with the new places of the moved rows."""
    names = [f"{spec.name}_{name}" for name in ("file", "row_group", "row")]
    places = list(zip(*(index[name].to_pylist() for name in names), strict=True))

    def where(file: str, row_group: int, row: int) -> tuple[str, int, int]:
        if file not in moved:
            return file, row_group, row
        new_file, rows = moved[file]
        return (new_file, *rows[row_group, row][:2])

    new = [where(*place) for place in places]
    for position, name in enumerate(names):
        at = index.schema.get_field_index(name)
        column = pa.array([place[position] for place in new], index.schema.field(at).type)
        index = index.set_column(at, name, column)
    empty = None if spec.empty_at is None else where(*spec.empty_at)
    return index, replace(spec, empty_at=empty)
