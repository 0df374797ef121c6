"""WebDataset tars as metadata rows: members of one stem are one sample, read from their place when needed."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO

from ray_diffsynth import storage
from ray_diffsynth.data.archives.listings import Listing, listings
from ray_diffsynth.data.archives.opened import check_there, opened_archive
from ray_diffsynth.data.archives.samples import ArchiveSamples, table_of
from ray_diffsynth.data.formats import RawTable
from ray_diffsynth.data.formats.raw import what_it_is
from ray_diffsynth.data.media import MediaError, source_stamp, with_retries
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
    name, kept = found.archive, listings()
    try:
        stamp = "" if kept is None else source_stamp(path)
        if kept is not None and (known := kept.get(path, stamp)) is not None:
            _replay(path, known, found)
            return ""
        listing = Listing()
        with opened_archive(path, "tar") as (file, size):
            end = _members(file, found, listing)
        if size < end:
            return f"{name} is cut short: it ends before its last member does"
    # Beside TarError: numbers in a damaged header are ValueErrors, or too large for a file's offset.
    except (MediaError, tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        check_there(path, "tar", error)
        if why := what_it_is(path):
            return f"{name} is {why}"
        reason = error.reason if isinstance(error, MediaError) else error
        return f"{name} cannot be read to its end ({reason}); {len(found.samples)} samples were found"
    if kept is not None:
        kept.put(path, stamp, listing)
    return ""


def _members(file: IO[bytes], found: ArchiveSamples, listing: Listing) -> int:
    """Take in the members by their headers, into the listing too; returns where the last one ends."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            listing.add(member.name, member.offset_data, member.size)
            _add(found, listing, -1, content.read)
        return int(archive.offset)


def _replay(path: str, known: Listing, found: ArchiveSamples) -> None:
    """Take in the members of a listing."""
    for number, (name, text) in enumerate(zip(known.names, known.texts, strict=True)):
        member = storage.member_path(path, (known.offsets[number], known.sizes[number]), name)
        again = partial(with_retries, member, partial(storage.read_bytes, member))
        _add(found, known, number, again if text is None else partial(bytes, text))


def _add(found: ArchiveSamples, listing: Listing, number: int, read: Callable[[], bytes]) -> None:
    """Take in a member, and what is read of it."""

    def text() -> bytes:
        content = read()
        listing.texts[number] = content
        return content

    name, size = listing.names[number], listing.sizes[number]
    place = storage.member_path(found.archive, (listing.offsets[number], size), name)
    found.add(name, place, size, text)
