"""Where the rows of a group lie, by key: some 28 bytes a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_diffsynth.preprocess.key_columns import Keys, Mask, Numbers, packed, positions

Places = npt.NDArray[np.int32]
"""(rows, 3): number of the file, row group, row in it."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a row lies: a Parquet file of its group's folder, its row group, and the row in it."""

    file: str
    row_group: int
    row: int


class Locations:
    """Rows by key. What was added first stays."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self._numbers: dict[str, int] = {}
        self._keys: Keys = packed([])  # sorted
        self._places: Places = np.empty((0, 3), np.int32)
        self._added: list[tuple[Keys, Places]] = []

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def __getitem__(self, key: str) -> Location:
        found = self.get(key)
        if found is None:
            raise KeyError(key)
        return found

    def get(self, key: str) -> Location | None:
        """Where the row of a key lies; None for one that is not known."""
        at = int(self.find(packed([key]))[0])
        return None if at < 0 else Location(self.files[self._places[at, 0]], *map(int, self._places[at, 1:]))

    @property
    def keys(self) -> Keys:
        """All keys, sorted; the number of a row is where its key stands here."""
        self._settle()
        return self._keys

    @property
    def places(self) -> Places:
        """The places of all, in the order of `keys`; the first column counts `files`."""
        self._settle()
        return self._places

    def _settle(self) -> None:
        if not self._added:
            return
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._added)])
        places = np.concatenate([self._places, *(places for _, places in self._added)])
        self._added = []
        order = np.argsort(keys, kind="stable")  # of equal keys the first comes first
        keys = keys[order]
        first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        self._keys, self._places = keys[first], places[order[first]]

    def find(self, keys: Keys) -> Numbers:
        """The numbers of the rows of some keys; -1 for those that are not known."""
        return positions(keys, self.keys)

    def add(self, keys: Keys, file: str, row_groups: Sequence[int] | Numbers, rows: Sequence[int] | Numbers) -> None:
        """Add rows of one file."""
        number = np.full(len(keys), self._number(file))
        self._added.append((keys, np.stack([number, row_groups, rows], axis=1).astype(np.int32)))

    def add_columns(self, keys: Keys, files: pa.ChunkedArray, row_groups: Numbers, rows: Numbers) -> None:
        """Add rows of any files."""
        coded = files.combine_chunks().dictionary_encode()
        numbers = np.array([self._number(file) for file in coded.dictionary.to_pylist()], dtype=np.int32)
        codes = numbers[coded.indices.to_numpy(zero_copy_only=False)]
        self._added.append((keys, np.stack([codes, row_groups, rows], axis=1).astype(np.int32)))

    def keep(self, which: Mask) -> None:
        """Forget all rows but these, in the order of `keys`."""
        keys = self.keys
        self._keys, self._places = keys[which], self._places[which]

    def by_file(self) -> Iterator[tuple[str, Numbers]]:
        """Each file that holds a row, with the numbers of its rows in the order in which they lie in it."""
        places = self.places
        order = np.lexsort((places[:, 2], places[:, 1], places[:, 0]))
        files = places[order, 0]
        edges = np.flatnonzero(np.diff(files)) + 1
        for part in np.split(order, edges) if len(order) else []:
            yield self.files[places[part[0], 0]], part

    def _number(self, file: str) -> int:
        if file not in self._numbers:
            self._numbers[file] = len(self.files)
            self.files.append(file)
        return self._numbers[file]
