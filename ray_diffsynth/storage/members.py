"""Files within archives, by their place: `shard.tar/@512+2048/a.jpg`. Nothing but the member is read.

The numbers of a place are the archive's own: of a tar offset and size; of a zip the offset of the member's header, its
compressed and its own size; of a Parquet file the row, the leaf column and, of a list of images, which one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ray_diffsynth.errors import UserError
from ray_diffsynth.storage.raw import raw_stamp, read_range, recent_stamp
from ray_diffsynth.storage.zip_member import CUT_SHORT, inflate_member

_ENDINGS = "tar|zip|parquet"
_MEMBER = re.compile(rf"(.+?\.({_ENDINGS}))/@([0-9]{{1,18}}(?:\+[0-9]{{1,18}})*)/([^/].*)", re.DOTALL | re.IGNORECASE)


class MemberError(UserError, ValueError):
    """A member of an archive that cannot be read, whatever its storage does; the message follows its name."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file within an archive: `kind` is the archive's ending ("tar"), `numbers` its place in it, all in bytes."""

    archive: str
    kind: str
    numbers: tuple[int, ...]
    name: str


def member_path(archive: str, numbers: Sequence[int], name: str) -> str:
    """Path of a file within an archive, by its place: `shard.tar/@512+2048/a.jpg`."""
    return f"{archive}/@{'+'.join(map(str, numbers))}/{name.lstrip('/') or '_'}"


def member_of(path: str) -> Member | None:
    """The member that a path is of; None for any other path."""
    found = _MEMBER.fullmatch(path) if "/@" in path else None
    if found is None:
        return None
    return Member(found[1], found[2].lower(), tuple(map(int, found[3].split("+"))), found[4])


def without_place(path: str) -> str:
    """A path as people know it: that of a member without its place (`shard.tar/a.jpg`), any other as it is."""
    member = member_of(path)
    return path if member is None else f"{member.archive}/{member.name}"


def member_stamp(member: Member, whole: str) -> str:
    """The stamp of a member of an archive with the stamp `whole`."""
    return whole and f"{whole}@{'+'.join(map(str, member.numbers))}"


def read_member(member: Member, stamp: str | None = None) -> bytes:
    """The member's content. `stamp`: what is known of the member's, so that the archive's is not asked for.

    Raises OSError, FileNotFoundError among them; MemberError where the archive is at fault.
    """
    try:
        return _READERS[member.kind](member, stamp.rpartition("@")[0] if stamp else None)
    except ValueError as error:
        raise MemberError(f"cannot be read from {member.archive}: {error}") from error


def member_size(member: Member) -> int:
    """Bytes of the member. Raises as `read_member`."""
    return len(read_member(member)) if member.kind == "parquet" else member.numbers[-1]


def _numbers(member: Member, *counts: int) -> tuple[int, ...]:
    if len(member.numbers) not in counts:
        raise ValueError(f"its place has {len(member.numbers)} numbers, that of a {member.kind}'s member {counts[0]}")
    return member.numbers


def _read_tar(member: Member, whole: str | None) -> bytes:
    offset, size = _numbers(member, 2)
    data = read_range(member.archive, offset, size)
    if len(data) != size:
        raise ValueError(f"it ends within the member at {offset}: {CUT_SHORT}")
    return data


def _read_zip(member: Member, whole: str | None) -> bytes:
    header, packed, size = _numbers(member, 3)
    return inflate_member(lambda start, count: read_range(member.archive, start, count), header, packed, size)


def _read_parquet(member: Member, whole: str | None) -> bytes:
    from ray_diffsynth.storage.parquet_member import read_cell

    row, leaf, *item = _numbers(member, 2, 3)
    stamp = whole or recent_stamp(member.archive)
    cell = (row, leaf, item[0] if item else None)
    try:
        return read_cell(member.archive, stamp, *cell)
    except ValueError:
        if (now := raw_stamp(member.archive)) == stamp:
            raise
        return read_cell(member.archive, now, *cell)  # by the places of another file than it was a moment ago


_READERS: Mapping[str, Callable[[Member, str | None], bytes]] = {
    "tar": _read_tar,
    "zip": _read_zip,
    "parquet": _read_parquet,
}
"""Ending of an archive's name -> what reads a member of it; it gets the archive's stamp too, if that is known."""
