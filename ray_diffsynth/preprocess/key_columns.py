"""Keys of many rows as columns of 16 bytes each, and what is looked up by them."""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

KEY_BYTES = 16

Keys = npt.NDArray[np.bytes_]
"""Packed keys, dtype `S16`. Compared and sorted as they are; an element by itself loses the zeros at its end."""
Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def packed(keys: Iterable[str]) -> Keys:
    """The keys as 16 bytes each: those of 32 hexadecimal digits, as all of this program, by these; others hashed."""
    return _as_keys(b"".join(map(_pack, keys)))


def _as_keys(data: bytes) -> Keys:
    return np.frombuffer(data, dtype=f"S{KEY_BYTES}") if data else np.empty(0, dtype=f"S{KEY_BYTES}")


def _pack(key: str) -> bytes:
    try:
        raw = binascii.unhexlify(key)
    except ValueError:
        raw = b""
    if len(raw) == KEY_BYTES and raw.hex() == key:
        return raw
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=KEY_BYTES, person=b"no digest").digest()


def hashed(texts: Iterable[str]) -> Keys:
    """Hashes of any texts, by which they are compared."""
    hashes = (hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=KEY_BYTES) for text in texts)
    return _as_keys(b"".join(one.digest() for one in hashes))


def packed_column(column: pa.ChunkedArray) -> Keys:
    """`packed` of a column of strings."""
    return np.concatenate([packed(chunk.to_pylist()) for chunk in _slices(column)] or [packed([])])


def _slices(column: pa.ChunkedArray, rows: int = 65536) -> Iterable[pa.ChunkedArray]:
    return (column.slice(start, rows) for start in range(0, len(column), rows))


def unpacked(keys: Keys) -> list[str]:
    """Keys of this program as their 32 hexadecimal digits."""
    text = keys.tobytes().hex()
    return [text[at : at + 2 * KEY_BYTES] for at in range(0, len(text), 2 * KEY_BYTES)]


def as_strings(keys: Keys) -> pa.Array:
    """The same as a column of strings."""
    data = binascii.hexlify(keys.tobytes())
    ends = np.arange(0, len(data) + 1, 2 * KEY_BYTES, dtype=np.int32)
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(ends), pa.py_buffer(data))


def first_of_each(keys: Keys) -> Numbers:
    """Where each distinct key stands first, ascending."""
    return np.sort(np.unique(keys, return_index=True)[1])


def positions(keys: Keys, among: Keys) -> Numbers:
    """Where each key stands `among` sorted ones; -1 for one that does not."""
    if not len(among):
        return np.full(len(keys), -1, dtype=np.int64)
    found = np.searchsorted(among, keys)
    found[found == len(among)] = 0
    return np.where(among[found] == keys, found, -1)


def is_among(keys: Keys, some: Iterable[str]) -> Mask:
    """Which of the keys are among some others."""
    return positions(keys, np.sort(packed(some))) >= 0


def reduced(values: Mask, ends: Sequence[int] | Numbers) -> Mask:
    """For each stretch of values, which ends at (without) its element of `ends`, whether all are true."""
    sums = np.concatenate([[0], np.cumsum(values)])
    edges = np.concatenate([[0], np.asarray(ends, dtype=np.int64)])
    whole: Mask = np.diff(sums[edges]) == np.diff(edges)
    return whole
