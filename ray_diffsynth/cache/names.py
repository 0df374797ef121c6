"""The names that a manifest and an index may hold, and the paths that are made of them: always inside the cache.

A manifest comes with a cache that others may have made, or damaged, and files that it names are read and removed. So a
name is of the form that this program writes, or it is refused; and a folder or file that is a link out of the cache
is refused as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from ray_diffsynth import storage
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.program import command

INDEX_FOLDER, QUARANTINE_FOLDER = "index", "quarantine"

_GROUP = re.compile(r"\w[\w.+-]{0,254}")
_SHARD = re.compile(r"[0-9a-f]{24}\.parquet")
_TABLE = re.compile(r"[0-9a-f]{32}\.parquet")


class UnsafeNameError(CacheError):
    """A name in a cache that this program does not write, or a link out of the cache; nothing was read or removed."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; no such file is read or removed. Take the cache from where it was made again, or delete its "
            f"manifest.json yourself and run {command('preprocess')}, which encodes only what is lost"
        )


def is_group(name: str) -> bool:
    """Whether it can be the name of a group and of its folder."""
    return bool(_GROUP.fullmatch(name)) and name.lower() not in (INDEX_FOLDER, QUARANTINE_FOLDER)


def is_shard(file: str) -> bool:
    """Whether it is named as a group's file: 24 hexadecimal digits."""
    return bool(_SHARD.fullmatch(file))


def is_table(file: str) -> bool:
    """Whether it is named as an index or quarantine file: 32 hexadecimal digits."""
    return bool(_TABLE.fullmatch(file))


def check_group(name: str, where: str) -> None:
    """Raise UnsafeNameError for what cannot be a group's name; `where` it stands."""
    if not is_group(name):
        raise UnsafeNameError(f"{where} names the group {name!r}, which is not the name of a folder of a cache")


def check_shard(file: str | None, where: str) -> None:
    """Raise UnsafeNameError for what is not the name of a group's file; `where` it stands."""
    if file is None or not is_shard(file):
        form = "24 hexadecimal digits and .parquet, without a folder"
        raise UnsafeNameError(f"{where} names the file {file!r}, which is not the name of a file of a group ({form})")


def check_table(path: str, folder: str, where: str) -> None:
    """Raise UnsafeNameError for what is not the relative path of a table in `folder`; `where` it stands."""
    parent, _, file = path.rpartition("/")
    if parent != folder or not is_table(file):
        form = f"{folder}/, 32 hexadecimal digits and .parquet"
        raise UnsafeNameError(f"{where} names the file {path!r}, which is not that of a cache's {folder} ({form})")


def check_shards(files: Iterable[str | None], where: str) -> None:
    """`check_shard` of each."""
    for file in files:
        check_shard(file, where)


def leads_out(cache: str, path: str) -> bool:
    """Whether a path below `cache` leads out of it over a link. An object store has no links."""
    if storage.is_remote(cache):
        return False
    root, real = (os.path.realpath(storage.absolute(place)) for place in (cache, path))
    return os.path.commonpath([root, real]) != root


def inside(cache: str, *names: str) -> str:
    """Path or URL of a folder or file of the cache, by checked names. Raises UnsafeNameError if a link leads out."""
    path = storage.join(cache, *names)
    if leads_out(cache, path):
        raise UnsafeNameError(f"{path} is a link out of the cache, or lies behind one; copy the files themselves there")
    return path


def shard_path(cache: str, group: str, file: str) -> str:
    """Path or URL of a group's file. Raises UnsafeNameError."""
    check_group(group, cache)
    check_shard(file, cache)
    return inside(cache, group, file)
