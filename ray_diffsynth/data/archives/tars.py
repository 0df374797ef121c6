"""WebDataset tars as metadata rows: members of one stem are one sample, read from their place when needed."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from typing import IO

from ray_diffsynth import storage
from ray_diffsynth.data.archives.opened import opened_archive
from ray_diffsynth.data.archives.samples import ArchiveSamples, table_of
from ray_diffsynth.data.formats import RawTable
from ray_diffsynth.data.formats.raw import what_it_is
from ray_diffsynth.data.media import MediaError
from ray_diffsynth.data.on_threads import on_threads


def read_tars(base_path: str, names: Sequence[str], file_column: str, text_column: str) -> RawTable:
    """The samples of the tars `names` (relative to `base_path`), in their order; only headers and texts are read.

    What its members are: see `ArchiveSamples.add`. Members named `__x__…` are not samples, by WebDataset's rule.
    Images of a form that is not read are warned of. A tar that cannot be read to its end gives what it has, and a row
    that says so.
    """

    def read(name: str) -> ArchiveSamples:
        found = ArchiveSamples(name, file_column, text_column)
        found.problem = _read_tar(storage.join(base_path, name), found)
        return found

    return table_of(base_path, on_threads(read, names), "tar", (file_column, text_column))


def _read_tar(path: str, found: ArchiveSamples) -> str:
    """Take in the members; returns what ended the reading too early. Raises StoreFailure."""
    name = found.archive
    try:
        with opened_archive(path, "tar") as (file, size):
            end = _members(file, found)
        if size < end:
            return f"{name} is cut short: it ends before its last member does"
    # Beside TarError: numbers in a damaged header are ValueErrors, or too large for a file's offset.
    except (MediaError, tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if why := what_it_is(path):
            return f"{name} is {why}"
        reason = error.reason if isinstance(error, MediaError) else error
        return f"{name} cannot be read to its end ({reason}); {len(found.samples)} samples were found"
    return ""


def _members(file: IO[bytes], found: ArchiveSamples) -> int:
    """Take in the members by their headers; returns where the last one ends."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if not member.isfile():
                continue
            place = storage.member_path(found.archive, (member.offset_data, member.size), member.name)
            content = archive.extractfile(member)
            if content is not None:
                found.add(member.name, place, member.size, content.read)
        return int(archive.offset)
