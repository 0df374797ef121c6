"""Files behind a path or a URL (`s3://`, `gs://`, `memory://` …): the few operations that data and cache need.

A path without a scheme is local and goes to the operating system directly, so that any character may stand in it.
"""

from __future__ import annotations

import os
import posixpath
import re
import secrets

import fsspec
import pyarrow as pa

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*(::|://)")
_TEMPORARY = re.compile(r"^\..+\.tmp-[0-9]+-[0-9a-f]+$")


def is_remote(path: str) -> bool:
    """True for a URL of anything but a local file."""
    return bool(_SCHEME.match(path)) and not path.startswith(("file://", "local://"))


def _local(path: str) -> str:
    return path.split("://", 1)[1] if path.startswith(("file://", "local://")) else path


def _remote(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    fs, inner = fsspec.core.url_to_fs(path)
    return fs, inner


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
    if is_remote(path):
        fs, inner = _remote(path)
        return int(fs.size(inner))
    return os.path.getsize(_local(path))


def read_bytes(path: str) -> bytes:
    """The whole file. Raises OSError, FileNotFoundError among them."""
    if is_remote(path):
        fs, inner = _remote(path)
        return bytes(fs.cat_file(inner))
    with open(_local(path), "rb") as file:
        return file.read()


def open_input(path: str) -> pa.NativeFile:
    """A seekable binary file that pyarrow and Pillow read parts of; close it (a context manager). Raises OSError."""
    if is_remote(path):
        fs, inner = _remote(path)
        return pa.PythonFile(fs.open(inner, "rb"), mode="r")
    # Not a memory map: a file that is cut short under a map kills the process with SIGBUS instead of raising.
    return pa.OSFile(_local(path), "rb")


def write_bytes_atomic(path: str, data: bytes | memoryview | pa.Buffer) -> None:
    """Write a file that is either whole or absent, also after a crash; an older one is replaced. Makes its folder.

    Local: a temporary file in the same folder, fsync, rename, fsync of the folder. Object store: one put, atomic there.
    """
    if is_remote(path):
        fs, inner = _remote(path)
        fs.makedirs(fs._parent(inner), exist_ok=True)
        fs.pipe_file(inner, bytes(data))
        return
    path = os.path.abspath(_local(path))
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_temporary(name: str) -> bool:
    """Whether a file name is that of a write that has not ended (or never will: its process died)."""
    return bool(_TEMPORARY.match(posixpath.basename(name)))


def list_files(folder: str, *, suffix: str | tuple[str, ...] = "", recursive: bool = False) -> list[str]:
    """Files in `folder`, as sorted paths relative to it with `/`; hidden ones (and unfinished writes) are left out.

    An absent folder holds no files. `suffix` is compared without regard to case.
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
        for parent, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")] if recursive else []
            inside = os.path.relpath(parent, root)
            found += [name if inside == "." else f"{inside.replace(os.sep, '/')}/{name}" for name in names]
    hidden = re.compile(r"(^|/)\.")
    return sorted(name for name in found if name.lower().endswith(suffixes) and not hidden.search(name))


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
