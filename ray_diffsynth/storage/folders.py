"""Local folders and prefixes of an object store as a whole: written at once, moved, removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ray_diffsynth.storage.paths import filesystem, join, local_path
from ray_diffsynth.storage.sync import sync_file, sync_folder
from ray_diffsynth.storage.write import pieces, write_bytes_atomic
from ray_diffsynth.system_errors import naming_file
from ray_diffsynth.urls import is_remote


def write_folder_atomic(folder: str, files: Mapping[str, bytes | Sequence[bytes | memoryview]]) -> None:
    """Write a folder that is either whole or absent, also after a crash; an older one goes.

    files: file name -> content, or its pieces.

    Local: under a hidden name beside it, fsync of files and folder, rename, fsync of the folder around it. What writes
    before it left unfinished there is removed, so only one process may write folders side by side. An object store has
    no rename: the files are put in their order, so that the last one makes the folder count. Raises OSError.
    """
    if is_remote(folder):
        for name, data in files.items():
            write_bytes_atomic(join(folder, name), data)
        return
    target = Path(os.path.abspath(local_path(folder)))
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".tmp-*"):
        remove_folder(str(left))
    temporary = target.parent / f".tmp-{target.name}-{os.getpid()}"
    temporary.mkdir()
    for name, data in files.items():
        with naming_file(target / name), open(temporary / name, "wb") as file:
            file.writelines(pieces(data))
            file.flush()
            sync_file(file.fileno())
    sync_folder(temporary)
    if target.exists():
        os.rename(target, target.parent / f".tmp-old-{target.name}-{os.getpid()}")
    os.rename(temporary, target)
    sync_folder(target.parent)
    for left in target.parent.glob(".tmp-old-*"):
        remove_folder(str(left))


def remove_folder(folder: str) -> None:
    """Remove a folder and what is in it; of a local one what cannot be removed stays."""
    if is_remote(folder):
        fs, inner = filesystem(folder)
        fs.rm(inner, recursive=True)
    else:
        shutil.rmtree(local_path(folder), ignore_errors=True)


def move(source: str, target: str) -> None:
    """Give a file or folder another name in the same store; an object store has no rename: there it is copied first."""
    if is_remote(source):
        fs, inner = filesystem(source)
        fs.mv(inner, filesystem(target)[1], recursive=bool(fs.isdir(inner)))
    else:
        os.rename(local_path(source), local_path(target))
