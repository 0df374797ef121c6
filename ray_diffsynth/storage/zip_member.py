"""One member of a zip archive, from a ranged read: stored or deflated, never larger than the archive says."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

MAX_MEMBER_BYTES = 1 << 30
"""Largest member that is inflated."""
MAX_RATIO = 1032
"""Largest factor by which deflate can shrink; an archive that claims more is damaged or hostile."""
STORED, DEFLATED = 0, 8
CUT_SHORT = "cut short, or written anew; copy or write it again"
"""What an archive is that ends within a member."""
_HEADER = struct.Struct("<4s5H3I2H")
_SLACK = 512
"""Bytes fetched for the header before the data, whose length it alone says."""


def check_sizes(packed: int, size: int) -> None:
    """Raise ValueError for sizes, as an archive states them, of which nothing should be read."""
    if size > MAX_MEMBER_BYTES:
        raise ValueError(f"it has {size / 2**30:.1f} GiB, more than the {MAX_MEMBER_BYTES >> 30} GiB that are inflated")
    if size > packed * MAX_RATIO + 64:
        raise ValueError(f"it claims to hold {size} bytes in {packed}, which no deflate does: damaged or hostile")


def inflate_member(read: Callable[[int, int], bytes], header: int, packed: int, size: int) -> bytes:
    """The content of the member whose local header begins at `header`. `read(start, count)` reads of the archive.

    Raises ValueError for a member that is not what the archive says, or an archive cut short; OSError from `read`.
    """
    check_sizes(packed, size)
    data = read(header, _SLACK + packed)
    if len(data) < _HEADER.size:
        raise ValueError(f"it ends within the member at {header}: {CUT_SHORT}")
    signature, _, flags, method, *_, name_bytes, extra_bytes = _HEADER.unpack_from(data)
    if signature != b"PK\x03\x04":
        raise ValueError(f"no member begins at {header}: the archive was changed, or is damaged")
    if flags & 1:
        raise ValueError("it is encrypted; write it without a password")
    start = _HEADER.size + name_bytes + extra_bytes
    content = data[start : start + packed]
    if len(content) < packed:
        content = read(header + start, packed)
    if len(content) < packed:
        raise ValueError(f"it ends within the member at {header}: {CUT_SHORT}")
    if method == STORED:
        if packed != size:
            raise ValueError(f"it is stored as it is, in {packed} bytes, and claims to have {size}")
        return content
    if method != DEFLATED:
        raise ValueError(f"it is compressed by method {method}, of which only stored and deflated are read")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = inflater.decompress(content, size + 1)
    except zlib.error as error:
        raise ValueError(f"damaged ({error})") from error
    if len(found) != size:
        raise ValueError(f"it does not have the {size} bytes that the archive states")
    return found
