"""Bring a damaged cache to a state from which stage 1 encodes only what is lost; drop what nothing points to.

Rows are addressed by content, so nothing is patched: what cannot be trusted is removed, and if the manifest named it,
the manifest goes too. Stage 2 then refuses the cache until stage 1 has run again, which finds all remaining rows by
their keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pyarrow as pa

from ray_diffsynth import storage
from ray_diffsynth.cache.commit import commit, old_tables
from ray_diffsynth.cache.errors import CacheError, UnreadableError, VersionError
from ray_diffsynth.cache.inspection import Place, named_rows
from ray_diffsynth.cache.lease import Lease, lease
from ray_diffsynth.cache.manifest import MANIFEST_FILE, GroupSpec, Manifest
from ray_diffsynth.cache.names import (
    INDEX_FOLDER,
    QUARANTINE_FOLDER,
    UnsafeNameError,
    inside,
    is_group,
    leads_out,
    shard_path,
)
from ray_diffsynth.cache.schema import table_parameters, table_schema
from ray_diffsynth.cache.store import (
    ForeignFileError,
    list_shards,
    open_shard,
    read_shard_header,
    shard_name,
    write_shard,
)
from ray_diffsynth.cache.verify import file_problem
from ray_diffsynth.program import command


@dataclass
class Repair:
    """What was done: removed paths with the reason, files written anew without unused rows, and the state after it."""

    removed: list[tuple[str, str]] = field(default_factory=list)
    compacted: list[str] = field(default_factory=list)
    committed: bool = True
    """False: the cache must be completed by stage 1 before it can be trained on."""

    def remove(self, paths: Iterable[tuple[str, str]]) -> None:
        """Remove files, given as (path, reason), and remember those that were there."""
        self.removed += [(path, reason) for path, reason in paths if storage.remove(path)]


@dataclass
class _Found:
    """What was found before anything is changed. damaged: (path, reason). unreferenced: intact shards that the manifest
    does not name; those in `repeated` hold only rows that named files hold too."""

    manifest: Manifest | None
    index: pa.Table | None
    groups: list[str]
    damaged: list[tuple[str, str]] = field(default_factory=list)
    unreferenced: list[tuple[str, str]] = field(default_factory=list)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    whole: bool = True


def repair_cache(cache: str, *, prune: bool = False) -> Repair:
    """Remove what is damaged or unfinished, with `prune` also what nothing points to.

    Everything is read first: when a file cannot be read (not the same as damaged) or is of another version, CacheError
    is raised and nothing is removed; so it is when manifest or index name what is no file of the cache. Files of other
    programs stay. Raises CacheError also while another process writes to the cache, and if there is none.
    """
    cache = storage.absolute(cache)
    if not storage.exists(cache):
        raise CacheError(f"{cache} is not there")
    if not _is_cache(cache):
        raise CacheError(f"{cache} is not a cache (no {MANIFEST_FILE}, no folder with files of one); check the path")
    done = Repair()
    with lease(cache) as held:
        try:
            found = _inspect(cache)
        except (UnreadableError, VersionError, UnsafeNameError) as error:
            raise CacheError(f"nothing was removed: {error}") from error
        held.check()
        done.remove(found.damaged)
        done.committed = found.whole
        if not found.whole:
            _uncommit(cache, found.manifest, done)
        elif prune:
            _prune(cache, found, held, done)
    return done


def _group_folders(cache: str) -> list[str]:
    """Folders that may be groups; one behind a link is another program's, unless the manifest names it."""
    folders = (name for name in storage.list_folders(cache) if is_group(name))
    return [name for name in folders if not leads_out(cache, storage.join(cache, name))]


def _is_cache(cache: str) -> bool:
    """Whether there is a manifest, or at least a shard that an unfinished run wrote."""
    if storage.exists(storage.join(cache, MANIFEST_FILE)):
        return True
    return any(_is_shard(cache, group, file) for group in _group_folders(cache) for file in list_shards(cache, group))


def _is_shard(cache: str, group: str, file: str) -> bool:
    try:
        read_shard_header(cache, group, file)
    except (UnreadableError, VersionError):
        raise
    except CacheError:
        return False
    return True


def _inspect(cache: str) -> _Found:
    """Read the whole cache. Raises UnreadableError, VersionError, UnsafeNameError."""
    found = _read_manifest(cache)
    folders = (cache, *(inside(cache, name) for name in (INDEX_FOLDER, QUARANTINE_FOLDER, *found.groups)))
    # This process's own is the heartbeat of the lease.
    unfinished = [path for folder in folders for path in storage.list_unfinished(folder)]
    unfinished = [path for path in unfinished if not storage.is_own_temporary(path)]
    found.damaged += [(path, "a write that never ended") for path in unfinished]
    specs = {} if found.index is None or found.manifest is None else {spec.name: spec for spec in found.manifest.groups}
    for group in sorted({*found.groups, *specs}):
        named = named_rows(found.index, specs[group]) if group in specs else {}
        for file, places in named.items():
            if problem := file_problem(cache, specs[group], file, places):
                found.damaged.append((shard_path(cache, group, file), problem))
                found.whole = False
        keys = {key for places in named.values() for _, _, key in places}
        for file in list_shards(cache, group):
            if file not in named:
                _inspect_unreferenced(cache, group, file, keys, found)
    if found.whole:
        found.damaged += found.repeated
    return found


def _inspect_unreferenced(cache: str, group: str, file: str, keys: set[str], found: _Found) -> None:
    """Judge a file that the manifest does not name: a damaged shard is removed, since a rerun encodes its rows anyway.

    So is one whose rows (`keys`) all lie in files that the manifest names: left by pruning that was interrupted.
    """
    path = shard_path(cache, group, file)
    try:
        shard = read_shard_header(cache, group, file, verify=True)
        found.unreferenced.append((path, "nothing points to it"))
        if shard.keys and not shard.failed and keys.issuperset(shard.keys):
            found.repeated.append((path, "all its rows are in files that the manifest names"))
    except UnreadableError:
        raise
    except (ForeignFileError, VersionError):
        return
    except CacheError as error:
        # Its header, which would tell who wrote it, is damaged; but its name is that of a shard.
        found.damaged.append((path, str(error)))


def _read_manifest(cache: str) -> _Found:
    """Manifest and index; None for the index, and False for `whole`, when they cannot be trusted."""
    path, groups = storage.join(cache, MANIFEST_FILE), _group_folders(cache)
    if not storage.exists(path):
        return _Found(None, None, groups, whole=False)
    manifest = None
    try:
        manifest = Manifest.load(cache)
        manifest.read_quarantine(cache)
        return _Found(manifest, manifest.read_index(cache), groups)
    except (UnreadableError, VersionError, UnsafeNameError):
        raise
    except CacheError as error:
        return _Found(manifest, None, groups, [(path, str(error))], whole=False)


def _uncommit(cache: str, manifest: Manifest | None, done: Repair) -> None:
    """Take the manifest away, then the tables that only it named."""
    files = (MANIFEST_FILE, *(() if manifest is None else manifest.tables()))
    reason = f"what it names is damaged; {command('preprocess')} writes a new one"
    done.remove((inside(cache, file), reason) for file in files)


def _prune(cache: str, found: _Found, held: Lease, done: Repair) -> None:
    """Write files anew that hold rows which nothing names, commit, then remove what the new manifest does not name."""
    manifest, index = found.manifest, found.index
    assert manifest is not None and index is not None
    specs, replaced = [], []
    for spec in manifest.groups:
        moved = {file: _compact(cache, spec, file, places) for file, places in named_rows(index, spec).items()}
        moved = {file: new for file, new in moved.items() if new[0] != file}
        replaced += [shard_path(cache, spec.name, file) for file in moved]
        index, spec = _relocated(index, spec, moved)
        sizes = storage.file_sizes(inside(cache, spec.name))
        specs.append(replace(spec, nbytes=sum(sizes[file] for file in named_rows(index, spec))))
    done.compacted += replaced
    held.check()
    if replaced:
        captions = manifest.read_captions(cache)
        quarantine = manifest.read_quarantine(cache)
        draft = replace(manifest, groups=tuple(specs))
        manifest = commit(cache, draft, index, quarantine, captions, check=held.check)
    named = {shard_path(cache, spec.name, file) for spec in specs for file in named_rows(index, spec)}
    unused = [*found.unreferenced, *((path, "nothing points to it") for path in replaced)]
    done.remove((path, reason) for path, reason in unused if path not in named)
    done.remove((path, "nothing points to it") for path in old_tables(cache, manifest))


def _compact(cache: str, spec: GroupSpec, file: str, places: list[Place]) -> tuple[str, dict[tuple[int, int], Place]]:
    """A file with only the rows at `places`: its name, and where each row went. The file itself if it has no others."""
    path = shard_path(cache, spec.name, file)
    with open_shard(path, spec.parameters) as (parquet, header, _):
        if parquet.metadata.num_rows == len(places):
            return file, {}
        table = parquet.read()
        table = table.cast(table_schema(table_parameters(table.schema)))  # whose offsets reach beyond 2 GiB
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
