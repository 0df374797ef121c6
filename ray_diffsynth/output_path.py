"""Whether a job can leave its results where it is told to, found out before any work is done. No torch."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from ray_diffsynth.errors import ConfigError
from ray_diffsynth.urls import is_remote

_REASONS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "may not be written by this user"),
    errno.EROFS: "is on a file system that is mounted read-only",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "has no space left"),
}
"""Error number -> what is wrong with a folder."""


def check_output_path(output_path: str, *, writes: bool = True) -> None:
    """Raise ConfigError for an output_path in which nothing can be written; with `writes` that is tried.

    A URL is looked at only by the store, when the first file is written. In a job of `ray job submit` the working
    folder is a copy that Ray deletes, so that a relative path is refused there.
    """
    if not output_path.strip():
        raise ConfigError("output_path is empty; give a folder, which is made if it is not there, or a URL")
    if "\0" in output_path:
        raise ConfigError("output_path holds a NUL character, which no path can have; check the file it comes from")
    if is_remote(output_path):
        return
    path = os.path.expanduser(output_path.removeprefix("file://").removeprefix("local://"))
    if not os.path.isabs(path):
        _check_working_folder(output_path)
    there = os.path.abspath(path)
    _check_folder(output_path, there)
    if writes:
        _check_writable(output_path, _nearest(there))


def _check_working_folder(output_path: str) -> None:
    try:
        folder = Path.cwd().as_posix()
    except FileNotFoundError:
        raise ConfigError("the working folder has been removed; cd into one that is there, and start again") from None
    if "runtime_resources/working_dir_files" in folder:
        raise ConfigError(
            f"output_path={output_path} is relative, which in a submitted Ray job is a folder that Ray deletes; "
            "use an absolute path or a URL that all machines see"
        )


def _nearest(path: str) -> str:
    """The path itself, or the innermost folder around it that is there."""
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def _check_folder(output_path: str, path: str) -> None:
    nearest = _nearest(path)
    if os.path.isdir(nearest):
        return
    what = "a link that leads nowhere" if os.path.islink(nearest) and not os.path.exists(nearest) else "a file"
    if nearest == path:
        raise ConfigError(f"output_path={output_path} is {what}; give a folder, which is made if it is not there")
    raise ConfigError(f"output_path={output_path}: {nearest} is {what}, in which no folder can be made; give another")


def _check_writable(output_path: str, folder: str) -> None:
    """By a folder made and removed: what the rights say is not all, on network drives above all."""
    try:
        tempfile.TemporaryDirectory(prefix=".", dir=folder).cleanup()
    except OSError as error:
        why = _REASONS.get(error.errno or 0, f"takes no new folder ({error.strerror})")
        raise ConfigError(f"output_path={output_path}: {folder} {why}; change that, or give another folder") from error
