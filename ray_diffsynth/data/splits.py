"""The layouts of Hugging Face's `datasets`: Parquet shards and folders of images that a name gives to a split."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ray_diffsynth import storage
from ray_diffsynth.data.formats import DatasetError
from ray_diffsynth.data.warnings import warn

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words in a file's or folder's name that mean it."""
_SHARD = re.compile(r"-\d{3,}-of-\d{3,}\.parquet$", re.IGNORECASE)
_FOLDERS = ("", "data", "default", "train", "validation", "test")
"""Folders of a dataset in which `datasets` writes shards."""
_TABLES = (".csv", ".jsonl", ".parquet")


def split_of(name: str) -> str | None:
    """The split that a relative path names; None if it names none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in SPLITS.items() if any(word in known for word in words)), None)


def is_split_table(name: str) -> bool:
    """Whether a relative path is that of a split's own metadata file, `train/metadata.jsonl`."""
    folder, _, file = name.partition("/")
    return folder in SPLITS and file in {f"metadata{suffix}" for suffix in _TABLES}


def split_files(base_path: str, top: Sequence[str], *, beside_images: bool = False) -> dict[str, list[str]]:
    """Split -> its Parquet shards, or its metadata file, relative to the folder; `top`: the files at its top.

    A file that names no split belongs to train. `beside_images`: there are images too, so that only a name such as
    `train-00000-of-00003.parquet` counts.
    """
    shards: list[str] = []
    for folder in _FOLDERS:
        inside = top if not folder else storage.list_files(storage.join(base_path, folder), suffix=".parquet")
        names = [f"{folder}/{name}" if folder else name for name in inside if name.lower().endswith(".parquet")]
        shards += [name for name in names if _SHARD.search(name) or (split_of(name) and not beside_images)]
    shards = [name for name in shards if not name.lower().endswith("/metadata.parquet")]
    found: dict[str, list[str]] = {}
    for name in sorted(shards):
        found.setdefault(split_of(name) or "train", []).append(name)
    for split in () if found or beside_images else SPLITS:
        tables = [f"{split}/metadata{suffix}" for suffix in _TABLES]
        if there := [name for name in tables if storage.exists(storage.join(base_path, name))]:
            found[split] = there[:1]
    return found


def chosen(base_path: str, splits: Mapping[str, list[str]], wanted: str | None) -> list[str]:
    """The files of the split that is `wanted`, else of the only one, else of train. Raises DatasetError."""
    names = ", ".join(splits)
    if wanted is not None:
        if wanted not in splits:
            raise DatasetError(
                f"{base_path} has no split {wanted!r}; "
                + (f"its splits are {names}; choose one by --dataset_split" if splits else "leave --dataset_split out")
            )
        return splits[wanted]
    split = next(iter(splits)) if len(splits) == 1 else "train"
    if split not in splits:
        raise DatasetError(f"{base_path} has the splits {names}, and none is train; choose one by --dataset_split")
    if len(splits) > 1:
        warn("file_left_out", base_path, f"of its splits {names} only {split} is read; --dataset_split chooses")
    return splits[split]
