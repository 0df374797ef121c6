"""What is written lasts through a crash: fsync, where the file system has it."""

from __future__ import annotations

import errno
import os

_NOT_REFUSALS = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""Errors of fsync that mean a loss of data; by others a file system says that it knows no fsync."""


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
