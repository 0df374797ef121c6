"""Where a table of samples is cut into parts: by the ids around each place, so that a change moves only cuts near it.

Cutting after every n-th row would move all cuts behind a new row, and every part behind it would have to be written
again.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import xxhash

WINDOW = 2048
"""Rows on each side that decide about a cut: parts have at least as many, and twice as many on average."""


def cut(ids: pa.ChunkedArray, window: int | None = None) -> list[range]:
    """Consecutive rows of each part; one range of no rows for an empty table.

    A part begins at the row whose id's hash is less than those of the `window` rows before it, and not more than those
    of the `window` rows behind it. So whether it does depends on these rows alone: a row that comes or goes changes at
    most three parts, usually one.
    """
    near = WINDOW if window is None else window
    hashes = _hashes(ids)
    starts = [0]
    # The least of 2 window + 1 rows is the least of its block of `window` rows too: only that one need be compared.
    for block in range(0, len(hashes), near):
        at = block + int(hashes[block : block + near].argmin())
        if near <= at < len(hashes) - near:
            before, behind = hashes[at - near : at], hashes[at + 1 : at + near + 1]
            if hashes[at] < before.min() and hashes[at] <= behind.min():
                starts.append(at)
    return [range(start, end) for start, end in pairwise([*starts, len(hashes)])]


def _hashes(ids: pa.ChunkedArray) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """XXH3-64 of each id, (rows,)."""
    found = [np.zeros(0, np.uint64)]
    for start in range(0, len(ids), 1 << 16):  # a few Python strings at a time
        texts = ids.slice(start, 1 << 16).cast(pa.binary()).to_pylist()
        found.append(np.fromiter((xxhash.xxh3_64_intdigest(text or b"") for text in texts), np.uint64, len(texts)))
    return np.concatenate(found)
