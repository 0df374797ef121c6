"""Errors of the machine, of an object store or of Ray's own resources, in one line with the fix. No torch, no ray."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ray_diffsynth.errors import first_line, remote_cause

_OBJECT_STORES = ("botocore", "aiobotocore", "s3fs", "gcsfs", "google", "adlfs", "azure", "aiohttp")
_SPACE = "check the rights and the free space there, or give another path"
_FIXES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT), _SPACE),
    errno.EFBIG: "raise the limit of a file's size (ulimit -f, or the file system's), or give another path",
    **dict.fromkeys((errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG), "give another path"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE), "the disk or the network drive fails; look at it, then run the same command"
    ),
}
"""Error number -> what to do about it."""
_OUT_OF = {
    "OutOfDiskError": "the disk of Ray's temporary folder is full; free some space, or set RAY_TMPDIR to another disk",
    "ObjectStoreFullError": "Ray's object store is full; free memory, or give /dev/shm more room",
    "OutOfMemoryError": "the machine's memory ran out, so Ray ended a process; use fewer workers or a smaller batch",
}
"""Exception of Ray -> what it means here."""


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within it an OSError that names no file, as those of `write` and `fsync` do not, names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def explain(error: BaseException | None) -> str | None:
    """The message for an error that the machine or an object store caused, through causes and Ray's wrappers.

    None for any other: that is one of the program, and has a traceback.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if message := _one(error):
            return message
        error = remote_cause(error) or error.__cause__
    return None


def _one(error: BaseException) -> str | None:
    module, name = type(error).__module__.partition(".")[0], type(error).__name__
    if module in _OBJECT_STORES:
        return (
            f"the object store cannot be used: {name}: {error}; check the URL, the credentials "
            "(for s3:// AWS_PROFILE or AWS_ACCESS_KEY_ID, for gs:// GOOGLE_APPLICATION_CREDENTIALS) and the network"
        )
    if module == "ray" and name in _OUT_OF:
        return f"{_OUT_OF[name]} ({first_line(error)})"
    if "No usable temporary directory found" in str(error):
        return f"{error}; set TMPDIR to a folder that can be written and has space"
    number = _number(error)
    return f"{error}; {_FIXES[number]}" if number in _FIXES else None


def _number(error: BaseException) -> int | None:
    """The operating system's error number; libraries in Rust (safetensors, tokenizers) write it into the text."""
    if isinstance(error, OSError):
        return error.errno
    written = re.search(r"\(os error (\d+)\)", str(error))
    return int(written[1]) if written and os.strerror(int(written[1])) in str(error) else None
