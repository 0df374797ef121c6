"""Writing and removing files: each is whole or absent, also after a crash."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ray_diffsynth.storage.paths import filesystem, local_path
from ray_diffsynth.storage.read import exists
from ray_diffsynth.storage.sync import sync_file, sync_folder
from ray_diffsynth.storage.temporary import temporary_path
from ray_diffsynth.system_errors import naming_file
from ray_diffsynth.urls import is_remote

if TYPE_CHECKING:
    import fsspec
    import pyarrow as pa

_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "memory"}


def write_bytes_atomic(
    path: str,
    data: bytes | memoryview | pa.Buffer | Sequence[bytes | memoryview],
    *,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write a file that is either whole or absent, also after a crash; an older one is replaced. Makes its folder.

    data: the content, or its pieces, which are not put together first where the file is local. check: called when all
    is ready, right before the file gets its name; where it raises, nothing is written or replaced.

    Local: a temporary file in the same folder, fsync, rename, fsync of the folder (where the file system has these).
    Object store: one put, atomic there.
    """
    if is_remote(path):
        fs, inner = filesystem(path)
        _make_parent(fs, inner)
        content = b"".join(pieces(data))
        check()
        fs.pipe_file(inner, content)
        return
    path = os.path.abspath(local_path(path))
    temporary = _write_temporary(path, pieces(data), sync=True)
    try:
        check()
        os.replace(temporary, path)
    except BaseException:
        os.remove(temporary)
        raise
    with naming_file(path):
        sync_folder(os.path.dirname(path))


def create_new(path: str, data: bytes) -> bool:
    """Write a file that is not there yet; False if it is.

    On an object store by a conditional put; where a store knows none, of two attempts at the same moment both succeed
    and the last one wins.
    """
    if is_remote(path):
        fs, inner = filesystem(path)
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
    path = os.path.abspath(local_path(path))
    temporary = _write_temporary(path, [data], sync=False)
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


def pieces(
    data: bytes | memoryview | pa.Buffer | Sequence[bytes | memoryview],
) -> Sequence[bytes | memoryview | pa.Buffer]:
    """The pieces of a file's content, which may be one."""
    return data if isinstance(data, list | tuple) else [data]


def _write_temporary(path: str, data: Sequence[bytes | memoryview | pa.Buffer], *, sync: bool) -> str:
    """Write the data to a temporary file in the folder of `path`, which it makes; returns the file's path.

    sync: whether to wait until the data is on the disk. A failed write leaves no file.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = temporary_path(folder, name)
    try:
        with naming_file(path), open(temporary, "xb") as file:
            file.writelines(data)
            if sync:
                file.flush()
                sync_file(file.fileno())
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    return temporary


def _create_without_condition(path: str, data: bytes) -> bool:
    if exists(path):
        return False
    write_bytes_atomic(path, data)
    return True


def _make_parent(fs: fsspec.AbstractFileSystem, inner: str) -> None:
    """The folder of a file, where the store has folders; on an object store asking for one costs requests."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    parent = inner.rpartition("/")[0]
    if parent and protocols.isdisjoint(_WITHOUT_FOLDERS):
        fs.makedirs(parent, exist_ok=True)


def remove(path: str) -> bool:
    """Remove a file; False if it was not there."""
    try:
        if is_remote(path):
            fs, inner = filesystem(path)
            fs.rm_file(inner)
        else:
            os.remove(local_path(path))
    except FileNotFoundError:
        return False
    return True
