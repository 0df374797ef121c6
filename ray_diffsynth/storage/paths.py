"""Paths and URLs: what is local, where a file of a tar lies, and the file system behind a URL."""

from __future__ import annotations

import os
import posixpath
import re
from typing import TYPE_CHECKING

from ray_diffsynth.errors import UserError
from ray_diffsynth.urls import is_remote

if TYPE_CHECKING:  # half a second of imports, which a command that only says --help does not need
    import fsspec

_MEMBER = re.compile(r"^(.+\.tar)/@([0-9]+)\+([0-9]+)/[^/].*$")
_HIDDEN = re.compile(r"(^|/)\.")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra of this package that reads it."""


class StorageError(UserError, ValueError):
    """A URL that nothing here can open."""


def local_path(path: str) -> str:
    """The operating system's path of a local one, which may be written as a `file://` URL."""
    return path.split("://", 1)[1] if path.startswith(("file://", "local://")) else path


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path in it. Raises StorageError where nothing here can open it."""
    import fsspec

    # Without listings from memory: other processes write to the same folders.
    try:
        fs, inner = fsspec.core.url_to_fs(path, use_listings_cache=False)
    except ImportError as error:
        protocol = path.partition(":")[0].lower()
        extra = _EXTRAS.get(protocol)
        fix = f"pip install 'ray-diffsynth[{extra}]'" if extra else str(error)
        raise StorageError(
            f"{path} cannot be reached: {protocol}:// needs a further package, on all machines: {fix}"
        ) from error
    except ValueError as error:
        raise StorageError(f"{path} cannot be reached: {error}; check the URL") from error
    return fs, inner


def member_path(archive: str, offset: int, size: int, name: str) -> str:
    """Path of a file that lies uncompressed in a tar, by its place in it: `shard.tar/@512+2048/a.jpg`."""
    return f"{archive}/@{offset}+{size}/{name}"


def without_place(path: str) -> str:
    """A path as people know it: that of a tar's member without its place (`shard.tar/a.jpg`), any other as it is."""
    return re.sub(r"(\.tar)/@[0-9]+\+[0-9]+/", r"\1/", path, count=1)


def member_of(path: str) -> tuple[str, int, int] | None:
    """(tar, offset, size) of the path of a tar's member, offset and size in bytes; None for any other path."""
    found = _MEMBER.match(path)
    return None if found is None else (found[1], int(found[2]), int(found[3]))


def join(base: str, *parts: str) -> str:
    """`base` and `parts` with one separator between them; an absolute part or a URL starts anew, as in os.path.join."""
    for part in parts:
        if is_remote(part) or os.path.isabs(part):
            base = part
        elif is_remote(base):
            base = posixpath.join(base, part)
        else:
            base = os.path.join(base, part)
    return base


def absolute(path: str) -> str:
    """The path from the root (Ray workers run in another folder); a URL stays as it is."""
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(local_path(path)))


def is_hidden(name: str) -> bool:
    """Whether a path relative to a listed folder has a part that begins with a dot."""
    return bool(_HIDDEN.search(name))
