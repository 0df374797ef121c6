"""Files behind a path or a URL (`s3://`, `gs://`, `memory://` …): the few operations that data and cache need.

A path without a scheme is local and goes to the operating system directly, so that any character may stand in it.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import secrets
from typing import TYPE_CHECKING

from ray_diffsynth.errors import UserError
from ray_diffsynth.system_errors import naming_file
from ray_diffsynth.urls import is_remote as is_remote

if TYPE_CHECKING:  # half a second of imports, which a command that only says --help does not need
    import fsspec
    import pyarrow as pa

_MEMBER = re.compile(r"^(.+\.tar)/@([0-9]+)\+([0-9]+)/[^/].*$")
_TEMPORARY = re.compile(r"^\..+\.tmp-[0-9]+-[0-9a-f]+$")
_PROCESS = secrets.token_hex(4)
"""Tells the unfinished writes of this process from those of one that had its id before it, as happens in containers."""
_NOT_REFUSALS = (errno.EIO, errno.ENOSPC, errno.EDQUOT)


class StorageError(UserError, ValueError):
    """A URL that nothing here can open."""


def _local(path: str) -> str:
    return path.split("://", 1)[1] if path.startswith(("file://", "local://")) else path


def _remote(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
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


_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra of this package that reads it."""


def member_path(archive: str, offset: int, size: int, name: str) -> str:
    """Path of a file that lies uncompressed in a tar, by its place in it: `shard.tar/@512+2048/a.jpg`."""
    return f"{archive}/@{offset}+{size}/{name}"


def without_place(path: str) -> str:
    """A path as people know it: that of a tar's member without its place (`shard.tar/a.jpg`), any other as it is."""
    return re.sub(r"(\.tar)/@[0-9]+\+[0-9]+/", r"\1/", path, count=1)


def _member(path: str) -> tuple[str, int, int] | None:
    """(tar, offset, size) of a member's path."""
    found = _MEMBER.match(path)
    return None if found is None else (found[1], int(found[2]), int(found[3]))


def _read_member(archive: str, offset: int, size: int) -> bytes:
    if is_remote(archive):
        fs, inner = _remote(archive)
        data = bytes(fs.cat_file(inner, start=offset, end=offset + size))
    else:
        with open(_local(archive), "rb") as file:
            file.seek(offset)
            data = file.read(size)
    if len(data) != size:
        raise OSError(f"{archive} ends within the member at {offset}")
    return data


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
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(_local(path)))


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    if is_remote(path):
        fs, inner = _remote(path)
        return bool(fs.exists(inner))
    return os.path.exists(_local(path))


def is_folder(path: str) -> bool:
    """Whether `path` is a folder (of an object store: a prefix of at least one object)."""
    if is_remote(path):
        fs, inner = _remote(path)
        return bool(fs.isdir(inner))
    return os.path.isdir(_local(path))


def file_size(path: str) -> int:
    """Bytes of a file. Raises OSError, FileNotFoundError among them."""
    if member := _member(path):
        return member[2]
    if is_remote(path):
        fs, inner = _remote(path)
        return int(fs.size(inner))
    return os.path.getsize(_local(path))


def read_bytes(path: str) -> bytes:
    """The whole file. Raises OSError, FileNotFoundError among them."""
    if member := _member(path):
        return _read_member(*member)
    if is_remote(path):
        fs, inner = _remote(path)
        return bytes(fs.cat_file(inner))
    with open(_local(path), "rb") as file:
        return file.read()


def open_input(path: str, *, block_size: int | None = None) -> pa.NativeFile:
    """A seekable binary file that pyarrow and Pillow read parts of; close it (a context manager). Raises OSError.

    `block_size`: bytes of a remote file that are fetched at once, for who reads little of it.
    """
    import pyarrow as pa

    if member := _member(path):
        return pa.BufferReader(_read_member(*member))
    if is_remote(path):
        fs, inner = _remote(path)
        return pa.PythonFile(fs.open(inner, "rb", block_size=block_size), mode="r")
    # Not a memory map: a file that is cut short under a map kills the process with SIGBUS instead of raising.
    return pa.OSFile(_local(path), "rb")


_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "memory"}


def _make_parent(fs: fsspec.AbstractFileSystem, inner: str) -> None:
    """The folder of a file, where the store has folders; on an object store asking for one costs requests."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if protocols.isdisjoint(_WITHOUT_FOLDERS):
        fs.makedirs(fs._parent(inner), exist_ok=True)


def write_bytes_atomic(path: str, data: bytes | memoryview | pa.Buffer) -> None:
    """Write a file that is either whole or absent, also after a crash; an older one is replaced. Makes its folder.

    Local: a temporary file in the same folder, fsync, rename, fsync of the folder (where the file system has these).
    Object store: one put, atomic there.
    """
    if is_remote(path):
        fs, inner = _remote(path)
        _make_parent(fs, inner)
        fs.pipe_file(inner, bytes(data))
        return
    path = os.path.abspath(_local(path))
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = _temporary(folder, name)
    try:
        with naming_file(path), open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            sync_file(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    with naming_file(path):
        sync_folder(folder)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names of a local folder's files last through a crash, as `sync_file` does."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that may be written to, but not read: the files are there
        return
    try:
        sync_file(handle)
    finally:
        os.close(handle)


def sync_file(handle: int) -> None:
    """fsync, where it is not refused (network and FUSE file systems, folders above all): what fails raises OSError."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in _NOT_REFUSALS:
            raise


def _temporary(folder: str, name: str) -> str:
    return os.path.join(folder, f".{name}.tmp-{os.getpid()}-{_PROCESS}{secrets.token_hex(4)}")


def create_new(path: str, data: bytes) -> bool:
    """Write a file that is not there yet; False if it is.

    On an object store by a conditional put; where a store knows none, of two attempts at the same moment both succeed
    and the last one wins.
    """
    if is_remote(path):
        fs, inner = _remote(path)
        _make_parent(fs, inner)
        try:
            fs.pipe_file(inner, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            return _create_without_condition(path, data)
        except NotImplementedError:
            return _create_without_condition(path, data)
        return True
    path = os.path.abspath(_local(path))
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = _temporary(folder, name)
    try:
        with naming_file(path), open(temporary, "xb") as file:
            file.write(data)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    try:
        os.link(temporary, path)  # unlike a rename it fails when the name is taken
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "xb") as file:
                file.write(data)
        except FileExistsError:
            return False
    finally:
        os.remove(temporary)
    return True


def _create_without_condition(path: str, data: bytes) -> bool:
    if exists(path):
        return False
    write_bytes_atomic(path, data)
    return True


def is_temporary(name: str) -> bool:
    """Whether a file name is that of a write that has not ended (or never will: its process died)."""
    return bool(_TEMPORARY.match(posixpath.basename(name)))


def is_own_temporary(path: str) -> bool:
    """Whether it is a write of this process."""
    return is_temporary(path) and f".tmp-{os.getpid()}-{_PROCESS}" in posixpath.basename(path)


_HIDDEN = re.compile(r"(^|/)\.")
_IN_HIDDEN_FOLDER = re.compile(r"(^|/)\.[^/]*/")


def is_hidden(name: str) -> bool:
    """Whether a path relative to a listed folder has a part that begins with a dot."""
    return bool(_HIDDEN.search(name))


def list_files(
    folder: str,
    *,
    suffix: str | tuple[str, ...] = "",
    recursive: bool = False,
    hidden: bool = False,
    follow_links: bool = False,
) -> list[str]:
    """Files in `folder`, as sorted paths relative to it with `/`; an absent folder holds no files.

    Hidden files (and unfinished writes) are left out without `hidden`, what is in hidden folders always. `suffix` is
    compared without regard to case. `follow_links`: links to folders are gone into too, each folder once: not those
    that lie in `folder` anyway.
    """
    suffixes = tuple(s.lower() for s in ((suffix,) if isinstance(suffix, str) else suffix))
    found: list[str] = []
    if is_remote(folder):
        fs, inner = _remote(folder)
        if not fs.exists(inner):
            return []
        root = inner.rstrip("/") + "/"
        paths = fs.find(inner) if recursive else [e["name"] for e in fs.ls(inner, detail=True) if e["type"] == "file"]
        found = [path[len(root) :] for path in paths if path.startswith(root)]
    else:
        root = os.path.abspath(_local(folder))
        here = os.path.realpath(root)
        gone_into: set[str] = set()
        for parent, folders, names in os.walk(root, followlinks=follow_links):
            folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
            if follow_links:
                folders[:] = [name for name in folders if _is_new(os.path.join(parent, name), here, gone_into)]
            inside = os.path.relpath(parent, root)
            found += [name if inside == "." else f"{inside.replace(os.sep, '/')}/{name}" for name in names]
    left_out = _IN_HIDDEN_FOLDER if hidden else _HIDDEN
    return sorted(name for name in found if name.lower().endswith(suffixes) and not left_out.search(name))


def _is_new(folder: str, root: str, gone_into: set[str]) -> bool:
    """Whether a folder, or what a link leads to, is not listed by another path; a link that leads back never is."""
    real = os.path.realpath(folder)
    if os.path.islink(folder):
        inside = os.path.relpath(real, root).replace(os.sep, "/")
        above = f"{root}{os.sep}".startswith(f"{real.rstrip(os.sep)}{os.sep}")
        if above or not is_hidden(inside):  # "..", what lies outside, begins with a dot too
            return False
    if real in gone_into:
        return False
    gone_into.add(real)
    return True


def file_sizes(folder: str) -> dict[str, int]:
    """Name -> bytes of the files that lie in `folder`, by one listing; an absent folder holds none."""
    if is_remote(folder):
        fs, inner = _remote(folder)
        try:
            entries = fs.ls(inner, detail=True)
        except FileNotFoundError:
            return {}
        found = {e["name"].rpartition("/")[2]: int(e["size"] or 0) for e in entries if e["type"] == "file"}
    elif os.path.isdir(_local(folder)):
        with os.scandir(_local(folder)) as entries:
            found = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    else:
        return {}
    return {name: size for name, size in found.items() if not name.startswith(".")}


def list_folders(folder: str) -> list[str]:
    """Names of the folders in `folder`, sorted, without hidden ones; an absent folder has none."""
    if is_remote(folder):
        fs, inner = _remote(folder)
        entries = fs.ls(inner, detail=True) if fs.exists(inner) else []
        names = [e["name"].rstrip("/").rpartition("/")[2] for e in entries if e["type"] == "directory"]
    else:
        root = _local(folder)
        names = [entry.name for entry in os.scandir(root) if entry.is_dir()] if os.path.isdir(root) else []
    return sorted(name for name in names if not name.startswith("."))


def list_unfinished(folder: str) -> list[str]:
    """Paths of writes into `folder` that have not ended; object stores keep none."""
    if is_remote(folder) or not os.path.isdir(_local(folder)):
        return []
    return sorted(os.path.join(_local(folder), name) for name in os.listdir(_local(folder)) if is_temporary(name))


def stamp(path: str) -> str:
    """What tells this content of a file from any other: equal stamps mean that it need not be read again.

    Size, times and inode (`cp -p` and `touch` can give new bytes an old time of modification); size and ETag or the
    like of a remote file, and nothing ("") where its store tells no version. Raises OSError or ValueError for a file
    that is absent or cannot be asked.
    """
    if member := _member(path):
        whole = stamp(member[0])
        return whole and f"{whole}@{member[1]}+{member[2]}"
    if not is_remote(path):
        found = os.stat(_local(path))
        return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}-{found.st_ino}"
    fs, inner = _remote(path)
    info = fs.info(inner)
    version = next((info[name] for name in _VERSIONS if info.get(name)), None)
    if version is None:
        try:
            version = fs.modified(inner)
        except NotImplementedError:
            return ""
    return f"{info.get('size')}-{version}"


_VERSIONS = ("ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "updated")


def remove(path: str) -> bool:
    """Remove a file; False if it was not there."""
    try:
        if is_remote(path):
            fs, inner = _remote(path)
            fs.rm_file(inner)
        else:
            os.remove(_local(path))
    except FileNotFoundError:
        return False
    return True
