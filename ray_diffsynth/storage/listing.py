"""Listing folders. Unfinished writes and what is hidden are left out, unless they are asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from ray_diffsynth.storage.paths import filesystem, is_hidden, join, local_path
from ray_diffsynth.storage.read import exists
from ray_diffsynth.storage.s3 import is_s3, names_in
from ray_diffsynth.storage.temporary import is_temporary
from ray_diffsynth.urls import is_remote

_IN_HIDDEN_FOLDER = re.compile(r"(^|/)\.[^/]*/")


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
        fs, inner = filesystem(folder)
        if not fs.exists(inner):
            return []
        root = inner.rstrip("/") + "/"
        paths = fs.find(inner) if recursive else [e["name"] for e in fs.ls(inner, detail=True) if e["type"] == "file"]
        found = [path[len(root) :] for path in paths if path.startswith(root)]
    else:
        root = os.path.abspath(local_path(folder))
        here = os.path.realpath(root)
        gone_into: set[str] = set()
        for parent, folders, names in os.walk(root, followlinks=follow_links):
            folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
            if follow_links:
                folders[:] = [name for name in folders if _is_new(os.path.join(parent, name), here, gone_into)]
            inside = os.path.relpath(parent, root)
            found += [name if inside == "." else f"{inside.replace(os.sep, '/')}/{name}" for name in names]
    left_out = _in_hidden_folder if hidden else is_hidden
    return sorted(name for name in found if name.lower().endswith(suffixes) and not left_out(name))


def _in_hidden_folder(name: str) -> bool:
    return bool(_IN_HIDDEN_FOLDER.search(name))


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
        fs, inner = filesystem(folder)
        try:
            entries = fs.ls(inner, detail=True)
        except FileNotFoundError:
            return {}
        found = {e["name"].rpartition("/")[2]: int(e["size"] or 0) for e in entries if e["type"] == "file"}
    elif os.path.isdir(local_path(folder)):
        with os.scandir(local_path(folder)) as entries:
            found = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    else:
        return {}
    return {name: size for name, size in found.items() if not name.startswith(".")}


def existing(folder: str, names: Sequence[str]) -> list[str]:
    """Those of the names that a file or folder in `folder` has, in their order; on S3 by one request."""
    if is_remote(folder):
        fs, inner = filesystem(folder)
        if is_s3(fs) and (found := names_in(fs, inner, os.path.commonprefix(names))) is not None:
            return [name for name in names if name in found]
    return [name for name in names if exists(join(folder, name))]


def list_folders(folder: str) -> list[str]:
    """Names of the folders in `folder`, sorted, without hidden ones; an absent folder has none."""
    if is_remote(folder):
        fs, inner = filesystem(folder)
        entries = fs.ls(inner, detail=True) if fs.exists(inner) else []
        names = [e["name"].rstrip("/").rpartition("/")[2] for e in entries if e["type"] == "directory"]
    else:
        root = local_path(folder)
        names = [entry.name for entry in os.scandir(root) if entry.is_dir()] if os.path.isdir(root) else []
    return sorted(name for name in names if not name.startswith("."))


def list_unfinished(folder: str) -> list[str]:
    """Paths of writes into `folder` that have not ended; object stores keep none."""
    root = local_path(folder)
    if is_remote(folder) or not os.path.isdir(root):
        return []
    return sorted(os.path.join(root, name) for name in os.listdir(root) if is_temporary(name))
