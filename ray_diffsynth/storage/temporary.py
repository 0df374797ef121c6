"""Names of files that are being written: hidden, and different for each process."""

from __future__ import annotations

import os
import posixpath
import re
import secrets

_TEMPORARY = re.compile(r"^\..+\.tmp-[0-9]+-[0-9a-f]+$")
_PROCESS = secrets.token_hex(4)
"""Tells the unfinished writes of this process from those of one that had its id before it, as happens in containers."""


def temporary_path(folder: str, name: str) -> str:
    """Where a local file `name` of `folder` is written before it gets its name."""
    return os.path.join(folder, f".{name}.tmp-{os.getpid()}-{_PROCESS}{secrets.token_hex(4)}")


def is_temporary(name: str) -> bool:
    """Whether a file name is that of a write that has not ended (or never will: its process died)."""
    return bool(_TEMPORARY.match(posixpath.basename(name)))


def is_own_temporary(path: str) -> bool:
    """Whether it is a write of this process."""
    return is_temporary(path) and f".tmp-{os.getpid()}-{_PROCESS}" in posixpath.basename(path)
