"""Does a cache hold what its manifest says: every row read, its checksum and key compared, its numbers finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ray_diffsynth import storage
from ray_diffsynth.cache.codec import CodecError
from ray_diffsynth.cache.errors import CacheError, UnreadableError, VersionError
from ray_diffsynth.cache.finite import is_finite as is_finite
from ray_diffsynth.cache.inspection import Place, named_rows, orphans
from ray_diffsynth.cache.manifest import GroupSpec, committed
from ray_diffsynth.cache.names import inside, shard_path
from ray_diffsynth.cache.schema import row_views
from ray_diffsynth.cache.store import READ_ERRORS, open_shard


@dataclass(frozen=True)
class Finding:
    """Something that is not as the manifest says: `damage` is wrong, `unreadable` not known, the rest takes space."""

    kind: Literal["damage", "unreadable", "orphan", "unfinished"]
    path: str
    problem: str


def verify_cache(cache: str, on_file: Callable[[str], None] = lambda path: None) -> list[Finding]:
    """Read the whole cache, one file in memory at a time; what is wrong with it, empty when nothing is.

    Raises CacheError when manifest or index cannot be read at all, UnsafeNameError when they name what is no file of
    the cache.
    """
    cache = storage.absolute(cache)
    manifest, index = committed(cache)
    manifest.read_quarantine(cache)
    found: list[Finding] = []
    for spec in manifest.groups:
        named = named_rows(index, spec)
        for file, places in named.items():
            path = shard_path(cache, spec.name, file)
            on_file(path)
            try:
                problem = file_problem(cache, spec, file, places)
                found += [Finding("damage", path, problem)] if problem else []
            except (UnreadableError, VersionError) as error:
                found.append(Finding("unreadable", path, str(error)))
        for file in orphans(cache, spec, named):
            found.append(Finding("orphan", shard_path(cache, spec.name, file), "the manifest does not name it"))
        folder = inside(cache, spec.name)
        found += [Finding("unfinished", path, "a write that never ended") for path in storage.list_unfinished(folder)]
    return found


def file_problem(cache: str, spec: GroupSpec, file: str, places: list[Place]) -> str | None:
    """The first thing wrong with a file of the cache, in words.

    Raises UnreadableError, VersionError, UnsafeNameError.
    """
    path = shard_path(cache, spec.name, file)
    try:
        with open_shard(path, spec.parameters, whole=True) as (parquet, header, _):
            if header["group"] != spec.name:
                return f"it belongs to the group {header['group']}"
            keys = {}
            for number in range(parquet.num_row_groups):
                table = parquet.read_row_group(number, use_threads=False)
                for row, view in enumerate(row_views(table)):
                    if not view.is_intact(header["codec"]):
                        return f"row {row} of row group {number} ({view.key}) does not match its checksum"
                    for name, value in view.decode(header["codec"]).items():
                        if not is_finite(value):
                            return f"row {row} of row group {number} ({view.key}): {name} holds NaN or infinity"
                    keys[number, row] = view.key
    except FileNotFoundError:
        return "it is absent"
    except (UnreadableError, VersionError):
        raise
    except (CacheError, CodecError, *READ_ERRORS) as error:
        return f"it cannot be read: {error}"
    for row_group, row, key in places:
        if keys.get((row_group, row)) != key:
            return f"the index names {key} in row {row} of row group {row_group}, where {keys.get((row_group, row))} is"
    return None
