"""Which files `--dataset_metadata_path` names: one, or several by commas, braces and patterns; why one is absent."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from ray_diffsynth import storage
from ray_diffsynth.data.archives import ARCHIVES
from ray_diffsynth.data.formats import READERS, DatasetError
from ray_diffsynth.data.patterns import expand_braces, is_pattern, matching, split_list

_WINDOWS = re.compile(r"(^|/)[A-Za-z]:[\\/]|\\")


def named_files(base_path: str, given: str) -> tuple[str, list[str]]:
    """The files that --dataset_metadata_path names: one, or several by commas, braces and patterns."""
    inside = storage.join(base_path, given)
    if storage.exists(given):
        # Relative to the working directory as in DiffSynth-Studio, else to the dataset.
        return given, [storage.absolute(given)]
    if storage.exists(inside) or not is_pattern(given):
        return inside if storage.exists(inside) else given, [given]
    return given, expanded(base_path, given, ["", base_path])


def metadata_path_from_root(base_path: str, given: str) -> str:
    """`--dataset_metadata_path` as another folder's process finds the same files.

    What is found from the working directory is written from the root; what is not is relative to the dataset.
    """
    if storage.exists(given):
        return storage.absolute(given)
    if not is_pattern(given) or storage.exists(storage.join(base_path, given)):
        return given
    entries = split_list(given)
    return ",".join(storage.absolute(one) if _matching(expand_braces(one)[0]) else one for one in entries)


def expanded(base_path: str, given: str, bases: Sequence[str]) -> list[str]:
    """The files of a list or pattern, each relative to the first of `bases` where something is found."""
    files: list[str] = []
    for entry in split_list(given):
        for name in expand_braces(entry):
            found = [path for base in bases for path in _matching(storage.join(base, name) if base else name)]
            if not found:
                raise DatasetError(f"{given}: there is no file {name}; check --dataset_metadata_path")
            files += dict.fromkeys(_relative(base_path, path) for path in found)
    if strange := [name for name in files if os.path.splitext(name)[1].lower() not in (*READERS, *ARCHIVES)]:
        raise DatasetError(f"{given}: {strange[0]} is not a metadata file; supported are {', '.join(endings())}")
    return list(dict.fromkeys(files))


def _matching(path: str) -> list[str]:
    found = matching(path)
    return found if found != [path] or storage.exists(path) else []


def _relative(base_path: str, path: str) -> str:
    """The path relative to the dataset's folder where it lies in it, else from the root."""
    path, base = storage.absolute(path), storage.absolute(base_path).rstrip("/") + "/"
    return path[len(base) :] if path.startswith(base) else path


def endings() -> tuple[str, ...]:
    """The endings of all files that are read as metadata, archives among them."""
    return (*READERS, *ARCHIVES)


def archive_ending(name: str) -> str | None:
    """The ending of an archive's name; None for what is none."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix in ARCHIVES else None


def why_absent(path: str) -> str:
    """What may be the cause that a folder or file is not found."""
    if _WINDOWS.search(path) and not storage.is_remote(path):
        return " (it is a path of Windows: write it as this system knows it, with /, e.g. /mnt/c/data under WSL)"
    if not storage.is_remote(path):
        return ""
    try:
        fs, inner = storage.filesystem(path)
        fs.info(inner)
    except FileNotFoundError as error:
        why = f" ({error})" if path.startswith("hf://") else ""
    except Exception as error:  # clients of object stores raise errors of their own
        why = f" ({type(error).__name__}: {error})"
    else:
        return ""
    if path.startswith("hf://"):
        why += (
            "; a dataset is hf://datasets/ORGANISATION/NAME[@revision], a private one needs `hf auth login` or HF_TOKEN"
        )
    return why
