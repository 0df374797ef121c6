"""What is wrong in a file, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Place: TypeAlias = tuple[str | int, ...]
"""Keys and positions from the top of a document to a value."""


@dataclass(frozen=True)
class Problem:
    """place: where in the document. message: what is wrong there, and the fix. shape: a value of another type stands
    there than every further rule expects, so that these are not asked."""

    place: Place
    message: str
    shape: bool = False

    def __str__(self) -> str:
        where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.place).lstrip(".")
        return f"{where}: {self.message}" if where else self.message


def walk(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value below `value`, itself first, with its place."""
    yield place, value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from walk(inner, (*place, key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for at, inner in enumerate(value):
            yield from walk(inner, (*place, at))


def mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping where it is none."""
    return value if isinstance(value, Mapping) else {}
