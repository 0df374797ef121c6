"""Stamps of many files, by their paths, in some 60 bytes each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa

from ray_diffsynth.preprocess.key_columns import hashed, positions

ROWS = 4096


class StampTable:
    """The stamps that listings told, as (path, stamp); one that is empty tells nothing."""

    def __init__(self, stamps: Iterable[tuple[str, str]]) -> None:
        hashes, texts = [hashed([])], [pa.array([], pa.string())]
        rest = iter(stamps)
        while some := list(islice(rest, ROWS)):
            hashes.append(hashed(path for path, _ in some))
            texts.append(pa.array([stamp for _, stamp in some], pa.string()))
        every = np.concatenate(hashes)
        order = np.argsort(every)
        self._hashes = every[order]
        self._stamps = pa.concat_arrays(texts).take(pa.array(order))

    def of(self, paths: Sequence[str]) -> dict[str, str]:
        """The stamps of those of the paths of which one was told."""
        if not len(self._hashes):
            return {}
        found = positions(hashed(paths), self._hashes)
        stamps = self._stamps.take(pa.array(np.where(found < 0, 0, found))).to_pylist()
        there = zip(paths, stamps, (found >= 0).tolist(), strict=True)
        return {path: stamp for path, stamp, told in there if told and stamp}
