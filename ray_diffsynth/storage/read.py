"""Reading files: whole or in parts, and the stamp that changes with the content."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ray_diffsynth.storage.members import member_of, member_size, member_stamp, read_member
from ray_diffsynth.storage.paths import filesystem, local_path
from ray_diffsynth.storage.raw import open_raw, raw_stamp, read_raw, read_raw_stamped, recent_stamp
from ray_diffsynth.urls import is_remote

if TYPE_CHECKING:
    import pyarrow as pa


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
    """Bytes of a file. Raises OSError, FileNotFoundError among them; MemberError."""
    if member := member_of(path):
        return member_size(member)
    if is_remote(path):
        fs, inner = filesystem(path)
        return int(fs.size(inner))
    return os.path.getsize(local_path(path))


def read_bytes(path: str, stamp: str | None = None) -> bytes:
    """The whole file. Raises OSError, FileNotFoundError among them; MemberError for a member that is damaged.

    `stamp`: the file's, where it is known. Without it a cell of a remote Parquet file may be some seconds old, so that
    not every image costs a question for the file's version.
    """
    if member := member_of(path):
        return read_member(member, stamp)
    return read_raw(path)


def read_stamped(path: str) -> tuple[bytes, str]:
    """The whole file and its `stamp`, by one request where the store tells both at once. Raises as both do.

    The content is never older than the stamp: where it is newer, the next look finds another stamp.
    """
    if member := member_of(path):
        # Of a Parquet file the content is that of this version, or newer, however old the version may be.
        whole = recent_stamp(member.archive) if member.kind == "parquet" else raw_stamp(member.archive)
        found = member_stamp(member, whole)
        return read_member(member, found), found
    return read_raw_stamped(path)


def open_input(path: str, *, block_size: int | None = None) -> pa.NativeFile:
    """A seekable binary file that pyarrow and Pillow read parts of; close it (a context manager). Raises OSError.

    `block_size`: bytes of a remote file that are fetched at once, for who reads little of it.
    """
    import pyarrow as pa

    if member := member_of(path):
        return pa.BufferReader(read_member(member))
    return open_raw(path, block_size=block_size)


def stamp(path: str) -> str:
    """The version of a file's content: equal stamps mean that it need not be read again.

    Size, times and inode (`cp -p` and `touch` can give new bytes an old time of modification); size and ETag or the
    like of a remote file, and nothing ("") where its store has no version. A member has its archive's, with its place.
    Raises OSError or ValueError for a file that is absent or cannot be asked.
    """
    if member := member_of(path):
        return member_stamp(member, raw_stamp(member.archive))
    return raw_stamp(path)
