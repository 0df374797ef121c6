"""Zip archives as metadata rows: by their central directory alone, each member read from its place when needed."""

from __future__ import annotations

import os
import posixpath
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ray_diffsynth import storage
from ray_diffsynth.data.archives.opened import opened_archive
from ray_diffsynth.data.archives.samples import MAX_TEXT_BYTES, ArchiveSamples, table_of
from ray_diffsynth.data.column_names import TEXT
from ray_diffsynth.data.formats import READERS, DatasetError, RawRow, RawTable
from ray_diffsynth.data.formats.raw import what_it_is
from ray_diffsynth.data.media import MediaError, with_retries
from ray_diffsynth.data.on_threads import on_threads
from ray_diffsynth.storage.zip_member import DEFLATED, STORED, check_sizes

_METHODS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA", 93: "Zstandard", 9: "Deflate64"}
_TEXTS = (".txt", ".json")
_TABLES = tuple(f"metadata{suffix}" for suffix in READERS)


def read_zips(base_path: str, names: Sequence[str], file_column: str, text_column: str) -> RawTable:
    """The samples of the zips `names` (relative to `base_path`), in their order; only directory and texts are read.

    Members are samples as those of a tar (`ArchiveSamples.add`), in the order of their names; or, where the archive has
    a `metadata.*` of its own, its rows are, whose files are members beside it. A member that cannot be read (encrypted,
    of another compression, larger than it may be) is a row that says so.
    """

    def read(name: str) -> ArchiveSamples | RawTable:
        return _read_zip(base_path, name, file_column, text_column)

    found = on_threads(read, names)
    tables = [one for one in found if isinstance(one, RawTable)]
    if not tables:
        archives = [one for one in found if isinstance(one, ArchiveSamples)]
        return table_of(base_path, archives, "zip", (file_column, text_column))
    if len(tables) < len(found):
        raise DatasetError(
            f"of the zips {', '.join(names)} some have a metadata file and some have none; give those of one kind by "
            "--dataset_metadata_path"
        )
    rows = [row for table in tables for row in table.rows]
    columns = dict.fromkeys(name for table in tables for name in table.columns)
    return replace(tables[0], columns=tuple(columns), rows=tuple(replace(r, number=n) for n, r in enumerate(rows, 1)))


def _read_zip(base_path: str, name: str, file_column: str, text_column: str) -> ArchiveSamples | RawTable:
    members, broken = _members(storage.join(base_path, name), name)
    tables = [member for member in members if posixpath.basename(member).lower() in _TABLES]
    if tables:
        return _table(base_path, min(tables, key=lambda member: (member.count("/"), member)), members, text_column)
    texts = [
        member for member, (_, size) in members.items() if member.lower().endswith(_TEXTS) and size <= MAX_TEXT_BYTES
    ]
    fetched = on_threads(lambda member: _fetched(storage.join(base_path, members[member][0])), texts)
    contents = dict(zip(texts, fetched, strict=True))
    found = ArchiveSamples(name, file_column, text_column)
    for member, (place, size) in members.items():
        found.add(member, place, size, partial(_content, contents, member))
    for member, why in broken.items():
        found.samples[member] = ({}, f"{member}: {why}")
    return found


def _members(path: str, name: str) -> tuple[dict[str, tuple[str, int]], dict[str, str]]:
    """Name -> (place, bytes) of the members, in the order of their names; name -> why, of those that are not read.

    Raises DatasetError for a file that is no zip, StoreFailure.
    """
    good: dict[str, tuple[str, int]] = {}
    broken: dict[str, str] = {}
    try:
        with opened_archive(path, "zip") as (file, _), zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
    except (MediaError, zipfile.BadZipFile, ValueError, OverflowError, EOFError, NotImplementedError) as error:
        why = what_it_is(path) or f"not a readable zip ({error}); write it again"
        raise DatasetError(f"{path} is {why}") from error
    for entry in entries:
        if entry.is_dir():
            continue
        try:
            _check(entry)
        except ValueError as error:
            broken[entry.filename] = str(error)
            continue
        numbers = (entry.header_offset, entry.compress_size, entry.file_size)
        good[entry.filename] = (storage.member_path(name, numbers, entry.filename), entry.file_size)
    return good, broken


def _check(entry: zipfile.ZipInfo) -> None:
    """Raise ValueError for a member that is not read."""
    if entry.flag_bits & 1:
        raise ValueError("it is encrypted; write it without a password")
    if entry.compress_type not in (STORED, DEFLATED):
        method = _METHODS.get(entry.compress_type, f"method {entry.compress_type}")
        raise ValueError(f"it is compressed by {method}, of which only stored and deflated are read; write it again")
    check_sizes(entry.compress_size, entry.file_size)


def _fetched(path: str) -> bytes | MediaError:
    try:
        return with_retries(path, partial(storage.read_bytes, path))
    except MediaError as error:
        return error


def _content(contents: Mapping[str, bytes | MediaError], member: str) -> bytes:
    found = contents[member]
    if isinstance(found, MediaError):
        raise ValueError(found.reason)
    return found


def _table(base_path: str, table: str, members: Mapping[str, tuple[str, int]], text_column: str) -> RawTable:
    """The rows of an archive's own metadata file, with the members that they name by their places."""
    raw = READERS[os.path.splitext(table)[1].lower()](storage.join(base_path, members[table][0]))
    folder = posixpath.dirname(table)

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(item) for item in value]
        member = posixpath.normpath(posixpath.join(folder, value)) if isinstance(value, str) else ""
        return members[member][0] if member in members else value

    def row(found: RawRow) -> RawRow:
        values = {name: v if name in (text_column, TEXT) else placed(v) for name, v in (found.values or {}).items()}
        source = storage.without_place(found.source)
        return replace(found, source=source, values=None if found.values is None else values)

    return replace(raw, rows=tuple(row(found) for found in raw.rows))
