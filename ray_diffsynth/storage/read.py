"""Reading files: whole or in parts, and the stamp that changes with the content."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ray_diffsynth.storage.paths import filesystem, local_path, member_of
from ray_diffsynth.urls import is_remote

if TYPE_CHECKING:
    import pyarrow as pa

_VERSIONS = ("ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "updated")
"""Keys under which file systems give the version of a file; the first that is there counts."""


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    if is_remote(path):
        fs, inner = filesystem(path)
        return bool(fs.exists(inner))
    return os.path.exists(local_path(path))


def is_folder(path: str) -> bool:
    """Whether `path` is a folder (of an object store: a prefix of at least one object)."""
    if is_remote(path):
        fs, inner = filesystem(path)
        return bool(fs.isdir(inner))
    return os.path.isdir(local_path(path))


def file_size(path: str) -> int:
    """Bytes of a file. Raises OSError, FileNotFoundError among them."""
    if member := member_of(path):
        return member[2]
    if is_remote(path):
        fs, inner = filesystem(path)
        return int(fs.size(inner))
    return os.path.getsize(local_path(path))


def read_bytes(path: str) -> bytes:
    """The whole file. Raises OSError, FileNotFoundError among them."""
    if member := member_of(path):
        return _read_member(*member)
    if is_remote(path):
        fs, inner = filesystem(path)
        return bytes(fs.cat_file(inner))
    with open(local_path(path), "rb") as file:
        return file.read()


def open_input(path: str, *, block_size: int | None = None) -> pa.NativeFile:
    """A seekable binary file that pyarrow and Pillow read parts of; close it (a context manager). Raises OSError.

    `block_size`: bytes of a remote file that are fetched at once, for who reads little of it.
    """
    import pyarrow as pa

    if member := member_of(path):
        return pa.BufferReader(_read_member(*member))
    if is_remote(path):
        fs, inner = filesystem(path)
        return pa.PythonFile(fs.open(inner, "rb", block_size=block_size), mode="r")
    # Not a memory map: a file that is cut short under a map kills the process with SIGBUS instead of raising.
    return pa.OSFile(local_path(path), "rb")


def stamp(path: str) -> str:
    """The version of a file's content: equal stamps mean that it need not be read again.

    Size, times and inode (`cp -p` and `touch` can give new bytes an old time of modification); size and ETag or the
    like of a remote file, and nothing ("") where its store has no version. Raises OSError or ValueError for a file
    that is absent or cannot be asked.
    """
    if member := member_of(path):
        whole = stamp(member[0])
        return whole and f"{whole}@{member[1]}+{member[2]}"
    if not is_remote(path):
        found = os.stat(local_path(path))
        return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}-{found.st_ino}"
    fs, inner = filesystem(path)
    info = fs.info(inner)
    version = next((info[name] for name in _VERSIONS if info.get(name)), None)
    if version is None:
        try:
            version = fs.modified(inner)
        except NotImplementedError:
            return ""
    return f"{info.get('size')}-{version}"


def _read_member(archive: str, offset: int, size: int) -> bytes:
    if is_remote(archive):
        fs, inner = filesystem(archive)
        data = bytes(fs.cat_file(inner, start=offset, end=offset + size))
    else:
        with open(local_path(archive), "rb") as file:
            file.seek(offset)
            data = file.read(size)
    if len(data) != size:
        raise OSError(f"{archive} ends within the member at {offset}")
    return data
