"""What a dataset is made of: metadata files, archives, shards of a split, or a folder of images; and their rows."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ray_diffsynth import storage
from ray_diffsynth.data.archives import ARCHIVES
from ray_diffsynth.data.column_names import FILE_NAME, ColumnNames
from ray_diffsynth.data.folder import read_folder
from ray_diffsynth.data.formats import READERS, DatasetError, RawTable
from ray_diffsynth.data.metadata_files import archive_ending, endings, expanded, named_files, why_absent
from ray_diffsynth.data.patterns import is_pattern
from ray_diffsynth.data.row_checks import NULL_WORDS
from ray_diffsynth.data.rows import paths_of
from ray_diffsynth.data.splits import chosen, is_split_table, split_files
from ray_diffsynth.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from ray_diffsynth.data.warnings import warn


@dataclass(frozen=True)
class Layout:
    """The rows of a dataset: `path` is what messages call it, `columns` are those of its files as they call them."""

    path: str
    table: RawTable
    columns: tuple[str, ...]


def read_layout(
    base_path: str, metadata_path: str | None, names: ColumnNames, wanted: Sequence[str], split: str | None
) -> Layout:
    """All rows, their columns called as they are used. Raises DatasetError where there is nothing to read."""
    path, files = _find(base_path, metadata_path, split)
    if not files:
        tables = [("", read_folder(base_path, names.target, names.caption))]
    else:
        tables = list(_tables(base_path, files, names))
    columns = tuple(dict.fromkeys(name for _, table in tables for name in table.columns))
    alone = len(tables) == 1
    parts = [
        _prepared(base_path, name, table, names, wanted, file="" if alone or not name else name)
        for name, table in tables
    ]
    rows = tuple(row for part in parts for row in part.rows)
    used = tuple(dict.fromkeys(name for part in parts for name in part.columns))
    texts = {part.absent_text for part in parts}
    absent = parts[0].absent_text if len(texts) == 1 else RawTable.absent_text
    return Layout(path, RawTable(used, rows, absent_text=absent), columns)


def _find(base_path: str, metadata_path: str | None, split: str | None) -> tuple[str, list[str]]:
    """(what messages call it, its files, relative to `base_path` where they lie in it); none: a folder of images."""
    if metadata_path is not None:
        if split is not None:
            raise DatasetError(
                f"--dataset_split {split} chooses among the files of a folder, and --dataset_metadata_path names one; "
                "leave one of them out"
            )
        return named_files(base_path, metadata_path)
    if not storage.exists(base_path):
        if is_pattern(base_path):
            return base_path, expanded(base_path, base_path, [""])
        raise DatasetError(
            f"the dataset folder {base_path} does not exist{why_absent(base_path)}; check --dataset_base_path"
        )
    if archive_ending(base_path) and not storage.is_folder(base_path):
        return base_path, [storage.absolute(base_path)]
    found = storage.existing(base_path, [f"metadata{suffix}" for suffix in READERS])
    if len(found) > 1:
        shown = ", ".join(storage.join(base_path, name) for name in found)
        raise DatasetError(f"{base_path} has several metadata files ({shown}); name one with --dataset_metadata_path")
    if found:
        if split not in (None, "train"):
            chosen(base_path, {"train": found}, split)
        return storage.join(base_path, found[0]), found
    top = storage.list_files(base_path)
    if archives := [name for name in top if archive_ending(name)]:
        return base_path, _without_loose(top, archives, base_path, split)
    splits = split_files(base_path, top, beside_images=bool(_media(top)))
    if splits or split is not None:
        return base_path, chosen(base_path, splits, split)
    return base_path, []


def _without_loose(top: Sequence[str], archives: list[str], base_path: str, split: str | None) -> list[str]:
    """The archives that are the dataset; of those beside tars, and of images, it is warned that they are left out."""
    if split is not None:
        chosen(base_path, {}, split)
    tars = [name for name in archives if archive_ending(name) == ".tar"]
    loose = _media(top)
    if not tars and (
        loose or (storage.list_folders(base_path) and _media(storage.list_files(base_path, recursive=True)))
    ):
        return []  # a zip beside images: perhaps the download that they are of
    for name in [*(name for name in archives if tars and name not in tars), *loose]:
        warn("file_left_out", name, "it lies beside tars, which are the dataset; put it in a folder of its own")
    return tars or archives


def _media(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))]


def _tables(base_path: str, files: Sequence[str], names: ColumnNames) -> Iterator[tuple[str, RawTable]]:
    """Each metadata file's rows, with its name, and those of all archives that stand together."""
    for kind, group in groupby(files, archive_ending):
        together = list(group)
        if kind is not None:
            yield (
                together[0] if len(together) < len(files) else "",
                ARCHIVES[kind](base_path, together, names.target, names.caption),
            )
            continue
        for name in together:
            path = storage.join(base_path, name)
            suffix = os.path.splitext(path)[1].lower()
            exists = storage.exists(path)
            if exists and (suffix not in READERS or storage.is_folder(path)):
                raise DatasetError(f"{path} is not a metadata file; supported are {', '.join(endings())}")
            if not exists:
                raise DatasetError(
                    f"the metadata file {path} does not exist{why_absent(path)}; check --dataset_metadata_path"
                )
            yield name, READERS[suffix](path)


def _prepared(
    base_path: str, name: str, table: RawTable, names: ColumnNames, wanted: Sequence[str], *, file: str
) -> RawTable:
    """The table with the names of columns as they are used, null for words that mean it, and paths from the base."""
    folder = _folder_of_files(base_path, name, table, names, wanted)
    table = names.renamed(storage.join(base_path, name), table, wanted)
    texts = [column for column in names.texts if column in table.columns and table.null_words]
    files = [column for column in names.files if column in table.columns]
    prefix = storage.absolute(base_path).rstrip("/") + "/"

    def path_of(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        member = storage.member_of(value)
        if member is not None:  # a reader knows its file by the whole path
            return value.removeprefix(prefix) if member.archive.startswith(prefix) else value
        return posixpath.join(folder, value) if folder and value else value

    def changed(values: dict[str, Any]) -> dict[str, Any]:
        nothing = {c: None for c in texts if str(values.get(c)).strip().lower() in NULL_WORDS}
        paths = {c: values[c] for c in files if c in values}
        paths = {c: [path_of(p) for p in v] if isinstance(v, list | tuple) else path_of(v) for c, v in paths.items()}
        return values | nothing | paths

    rows = (row if row.values is None else replace(row, values=changed(dict(row.values))) for row in table.rows)
    return replace(table, rows=tuple(replace(row, file=file) if file else row for row in rows), null_words=False)


def _folder_of_files(base_path: str, name: str, table: RawTable, names: ColumnNames, wanted: Sequence[str]) -> str:
    """The folder that a table's files are relative to: its own, as in `datasets`, or the base.

    Its own by the name `file_name`, or as the table of a split, unless the first file is found from the base.
    """
    folder = posixpath.dirname(name)
    source = names.sources(table.columns, wanted).get(names.target, names.target)
    if not folder or os.path.isabs(name) or storage.is_remote(name):
        return ""
    if not source.endswith(FILE_NAME) and not is_split_table(name):
        return ""
    first = next((paths_of(row.values[source]) for row in table.rows if row.values and row.values.get(source)), [])
    if not first or not isinstance(first[0], str):
        return folder
    return "" if storage.exists(storage.join(base_path, first[0])) else folder
