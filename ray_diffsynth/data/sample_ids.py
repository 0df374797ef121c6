"""Ids of samples: the file as the row writes it, which keys all that is random about the sample in training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ray_diffsynth import storage
from ray_diffsynth.data.row_checks import escaped
from ray_diffsynth.data.rows import paths_of


class SampleIds:
    """Sample ids: the path as written, `#2`, `#3` … for further rows of the same file."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.rows: set[bytes] = set()
        self.count: dict[str, int] = {}

    def base(self, values: Mapping[str, Any], files: Sequence[str], without: str) -> str:
        """The id but for its number; `without`: what it is for a row that names no file."""
        for column in files:
            paths = paths_of(values.get(column))
            if paths and isinstance(paths[0], str) and paths[0]:
                return escaped(storage.without_place(paths[0]))
        return without

    def assign(self, base: str) -> str:
        """The next free id of this base."""
        name = base
        while name in self.taken:
            self.count[base] = self.count.get(base, 1) + 1
            name = f"{base}#{self.count[base]}"
        self.taken.add(name)
        return name

    def is_duplicate(self, values: Mapping[str, Any]) -> bool:
        """Whether the same row was asked about before."""
        text = json.dumps(values, sort_keys=True, default=repr)
        # Not the text: of a large dataset that would be held twice.
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        seen = digest in self.rows
        self.rows.add(digest)
        return seen
