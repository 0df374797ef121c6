"""Paths and URLs: what is local, and the file system behind a URL."""

from __future__ import annotations

import os
import posixpath
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

from ray_diffsynth.errors import UserError
from ray_diffsynth.urls import is_remote

if TYPE_CHECKING:  # half a second of imports, which a command that only says --help does not need
    import fsspec

_HIDDEN = re.compile(r"(^|/)\.")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra of this package that reads it."""


class StorageError(UserError, ValueError):
    """A URL that nothing here can open."""


def local_path(path: str) -> str:
    """The operating system's path of a local one, which may be written as a `file://` URL (`%20` for a space)."""
    if not path.startswith(("file://", "local://")):
        return path
    inner = path.split("://", 1)[1].removeprefix("localhost")
    if "%" in inner and not os.path.exists(inner):  # as pathlib and browsers write it
        return unquote(inner)
    return inner


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


def join(base: str, *parts: str) -> str:
    """`base` and `parts` with one separator between them; an absolute part or a URL starts anew, as in os.path.join."""
    for part in parts:
        if is_remote(part) or os.path.isabs(part):
            base = part
        elif part.startswith(("file://", "local://")):
            base = local_path(part)
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
