"""A harmless extension type, to see that files which hold one are refused before its code is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow as pa

NAME = "tests.plain"


class Plain(pa.ExtensionType):
    """Counts in `asked` how often pyarrow rebuilt it from a file."""

    asked = 0

    def __init__(self, storage: pa.DataType) -> None:
        super().__init__(storage, NAME)

    def __arrow_ext_serialize__(self) -> bytes:
        return b"plain"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Plain:
        cls.asked += 1
        return cls(storage)


@contextmanager
def known_to_pyarrow(registered: bool) -> Iterator[None]:
    """Within it the type is registered, or not; it counts from 0."""
    Plain.asked = 0
    if registered:
        pa.register_extension_type(Plain(pa.binary()))
    try:
        yield
    finally:
        if registered:
            pa.unregister_extension_type(NAME)


def plain(values: pa.Array) -> pa.Array:
    return pa.ExtensionArray.from_storage(Plain(values.type), values)


def _dictionary() -> pa.Array:
    return plain(pa.array(["a", "b"]).dictionary_encode())


def _map() -> pa.Array:
    return pa.MapArray.from_arrays(pa.array([0, 1, 2], pa.int32()), pa.array(["k", "l"]), plain(pa.array([1, 2])))


NESTED: dict[str, Callable[[], pa.Array]] = {
    "itself": lambda: plain(pa.array([b"a", b"b"])),
    "struct": lambda: pa.StructArray.from_arrays([pa.array([1, 2]), plain(pa.array(["a", "b"]))], ["n", "inner"]),
    "list": lambda: pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), plain(pa.array([b"a", b"b"]))),
    "large list": lambda: pa.LargeListArray.from_arrays(pa.array([0, 1, 2]), plain(pa.array([1.0, 2.0]))),
    "fixed list": lambda: pa.FixedSizeListArray.from_arrays(plain(pa.array([1, 2])), 1),
    "list of structs": lambda: pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), NESTED["struct"]()),
    "map": _map,
    "dictionary": _dictionary,
}
"""Columns of two rows that hold it."""
