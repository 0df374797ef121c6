"""Files as their file system gives them, members of archives apart: whole, in parts, and their version."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_diffsynth.storage.paths import filesystem, local_path
from ray_diffsynth.storage.s3 import get_object, is_s3
from ray_diffsynth.urls import is_remote

if TYPE_CHECKING:
    import pyarrow as pa

RECENT_SECONDS, MOST_RECENT = 60.0, 64
"""How long, and of how many files, the stamp is remembered where it need not be the newest."""
_asking = threading.Lock()
_recent: OrderedDict[str, tuple[str, float]] = OrderedDict()
"""Path -> its stamp, and until when that counts."""
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "mtime", "LastModified", "last_modified", "updated")
"""Keys under which file systems give the version of a file; the first that is there counts."""


def open_raw(path: str, *, block_size: int | None = None, cache_type: str | None = None) -> pa.NativeFile:
    """A seekable binary file. Raises OSError. `block_size`, `cache_type`: what fsspec fetches of a remote one."""
    import pyarrow as pa

    if is_remote(path):
        fs, inner = filesystem(path)
        more = {} if cache_type is None else {"cache_type": cache_type}
        return pa.PythonFile(fs.open(inner, "rb", block_size=block_size, **more), mode="r")
    # Not a memory map: a file that is cut short under a map kills the process with SIGBUS instead of raising.
    return pa.OSFile(local_path(path), "rb")


def read_range(path: str, start: int, size: int) -> bytes:
    """`size` bytes from `start`, by one request; fewer where the file ends, also before `start`. Raises OSError."""
    if is_remote(path):
        fs, inner = filesystem(path)
        try:
            return bytes(fs.cat_file(inner, start=start, end=start + size))
        except (FileNotFoundError, PermissionError):
            raise
        # Stores refuse a range that begins behind the end, each with an error of its own.
        except Exception:
            if start and int(fs.size(inner)) <= start:
                return b""
            raise
    with open(local_path(path), "rb") as file:
        file.seek(start)
        return file.read(size)


def read_raw(path: str) -> bytes:
    """The whole file. Raises OSError."""
    if not is_remote(path):
        with open(local_path(path), "rb") as file:
            return file.read()
    fs, inner = filesystem(path)
    return get_object(fs, inner)[0] if is_s3(fs) else bytes(fs.cat_file(inner))


def read_raw_stamped(path: str) -> tuple[bytes, str]:
    """The whole file and its `raw_stamp`, by one request where its store tells both at once. Raises as both do."""
    if is_remote(path):
        fs, inner = filesystem(path)
        if is_s3(fs):
            data, info = get_object(fs, inner)
            return data, stamp_of(info)
    before = raw_stamp(path)
    return read_raw(path), before


def raw_stamp(path: str) -> str:
    """As `storage.stamp`, of a file that is no member."""
    if not is_remote(path):
        found = os.stat(local_path(path))
        return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}-{found.st_ino}"
    fs, inner = filesystem(path)
    info = fs.info(inner)
    if found_stamp := stamp_of(info):
        return found_stamp
    try:
        return f"{info.get('size')}-{fs.modified(inner)}"
    except NotImplementedError:
        return ""


def recent_stamp(path: str) -> str:
    """As `raw_stamp`; that of a remote file may be as old as RECENT_SECONDS."""
    if not is_remote(path):
        return raw_stamp(path)
    with _asking:
        found = _recent.get(path)
        if found is None or time.monotonic() > found[1]:
            _recent[path] = found = (raw_stamp(path), time.monotonic() + RECENT_SECONDS)
            while len(_recent) > MOST_RECENT:
                _recent.popitem(last=False)
    return found[0]


def stamp_of(info: Mapping[str, Any]) -> str:
    """The stamp of a remote file by what its store tells of it, alone or in a listing; "" where that has no version."""
    name = next((name for name in _VERSIONS if info.get(name)), None)
    if name is None:
        return ""
    # Some stores write it with quotes in one answer and without in another.
    version = f'"{str(info[name]).removeprefix("W/").strip(chr(34))}"' if name == "ETag" else info[name]
    return f"{info.get('size')}-{version}"
