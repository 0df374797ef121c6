"""Very many texts, such as the paths of a dataset, sorted, in little more memory than their characters take."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

ROWS = 4096


class SortedTexts:
    """Distinct texts in the order of their code points. Those that UTF-8 cannot write are left out."""

    def __init__(self, parts: Iterable[Sequence[str] | pa.Array]) -> None:
        arrays = [_array(part) for part in parts]
        texts = pa.concat_arrays([*arrays, _array([])])
        del arrays
        texts = texts.take(pc.sort_indices(texts))
        new = pc.not_equal(texts.slice(1), texts.slice(0, max(len(texts) - 1, 0)))
        self._texts = texts if pc.all(new, min_count=0).as_py() else texts.filter(_with_first(new))

    @classmethod
    def of(cls, texts: Iterable[str], kinds: Sequence[Callable[[str], bool]]) -> list[SortedTexts]:
        """Those of each kind, which are told apart a part at a time."""
        found: list[list[pa.Array]] = [[] for _ in kinds]
        rest = iter(texts)
        while part := list(islice(rest, ROWS)):
            for arrays, kind in zip(found, kinds, strict=True):
                if some := [text for text in part if kind(text)]:
                    arrays.append(_array(some))
        return [cls(arrays) for arrays in found]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, at: int) -> str:
        return str(self._texts[at].as_py())

    def between(self, start: int, end: int) -> Iterator[str]:
        """The texts from one place on, until another."""
        for at in range(start, end, ROWS):
            yield from self._texts.slice(at, min(ROWS, end - at)).to_pylist()

    def range_of(self, beginning: str) -> tuple[int, int]:
        """Places of the texts that begin so: of the first, and behind the last. `beginning` ends with ASCII."""
        behind = beginning[:-1] + chr(ord(beginning[-1]) + 1)
        start, end = (bisect_left(range(len(self)), text, key=self.__getitem__) for text in (beginning, behind))
        return start, end


def _array(texts: Sequence[str] | pa.Array) -> pa.Array:
    if isinstance(texts, pa.Array):
        return texts
    try:
        return pa.array(texts, pa.large_string())
    except UnicodeEncodeError:
        return pa.array([text for text in texts if text.encode(errors="ignore").decode() == text], pa.large_string())


def _with_first(new: pa.Array) -> pa.Array:
    return pa.concat_arrays([pa.array([True]), new])
