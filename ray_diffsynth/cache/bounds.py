"""Memory that a stored value takes, from its shape and the head of its bytes, before any memory is taken.

A cell may come from anywhere: 3 bytes may claim to be a tensor of gigabytes. A claim that the bytes cannot keep, or
that is beyond MAX_VALUE_BYTES, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_VALUE_BYTES = (2 << 30) - (2 << 20)
"""Of a value that is compressed, before and after; what a page of Parquet can hold behind the values before it."""
_MAX_DIMENSIONS = 64
_ZSTD_MAGIC = 0xFD2FB528
_ZSTD_BLOCK = 128 << 10
_DEFLATE_RATIO = 1032
"""The most that a byte of deflate, PNG's compression, stands for."""
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def array_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of a dense array. Raises ValueError for what is no shape."""
    if len(shape) > _MAX_DIMENSIONS or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"{list(shape[:_MAX_DIMENSIONS])} is not the shape of a value")
    return math.prod(shape) * itemsize


def check_limit(size: int) -> int:
    """The size again. Raises ValueError for more than MAX_VALUE_BYTES."""
    if size > MAX_VALUE_BYTES:
        raise ValueError(f"a value of {size:,} bytes is beyond the {MAX_VALUE_BYTES:,} that one may have")
    return size


def check_zstd(data: memoryview, size: int) -> None:
    """Raise ValueError unless zstd frames in `data` can give `size` bytes: by their headers, and those of their blocks.

    Source: RFC 8878, sections 3.1.1.1 and 3.1.1.2.
    """
    check_limit(size)
    at = most = stated = 0
    all_stated = True
    while at < len(data):
        at, content, blocks = _frame(data, at)
        if content is not None and content > blocks:
            raise ValueError(f"a zstd frame claims {content:,} bytes, its blocks can give {blocks:,}")
        all_stated &= content is not None
        stated += content or 0
        most += blocks
    if size > most or (all_stated and size != stated):
        raise ValueError(
            f"its {len(data)} bytes of zstd give {stated if all_stated else most:,} bytes, its shape {size:,}"
        )


def _frame(data: memoryview, at: int) -> tuple[int, int | None, int]:
    """The end of the frame that begins at `at`, the size that its header states, and the most that its blocks give."""

    def number(size: int) -> int:
        nonlocal at
        if at + size > len(data):
            raise ValueError("a zstd frame is cut short")
        at += size
        return int.from_bytes(data[at - size : at], "little")

    if number(4) != _ZSTD_MAGIC:
        raise ValueError("it is no zstd frame")
    descriptor = number(1)
    single = descriptor >> 5 & 1
    number(1 - single)  # window
    number((0, 1, 2, 4)[descriptor & 3])  # dictionary
    width = (single, 2, 4, 8)[descriptor >> 6]
    content = number(width) + (256 if width == 2 else 0) if width else None
    blocks, last = 0, 0
    while not last:
        header = number(3)
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == 3 or size > _ZSTD_BLOCK:
            raise ValueError("a zstd block is damaged")
        at += 1 if kind == 1 else size
        blocks += _ZSTD_BLOCK if kind == 2 else size
    at += 4 * (descriptor >> 2 & 1)  # checksum
    if at > len(data):
        raise ValueError("a zstd frame is cut short")
    return at, content, blocks


def png_bytes(data: memoryview) -> int:
    """Bytes of the pixels of a PNG file, by its header. Raises ValueError when the file is too short for them."""
    if bytes(data[:8]) != b"\x89PNG\r\n\x1a\n" or bytes(data[12:16]) != b"IHDR" or len(data) < 33:
        raise ValueError("it is no PNG file")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    depth, channels = data[24], _PNG_CHANNELS.get(data[25], 4)
    stored = -(-width * depth * channels // 8) * height
    if stored > _DEFLATE_RATIO * len(data):
        raise ValueError(f"a PNG file of {len(data)} bytes cannot hold {width}x{height} pixels")
    return check_limit(width * height * channels * max(1, depth // 8))
