"""How Parquet files that others may have made are opened: they give plain values, and none of their code is run.

pyarrow rebuilds the Arrow schema that a writer left in the footer, and with it every extension type of a registered
name, as soon as a file is opened: a type's own code then reads the file's bytes (Ray registers types that unpickle).
So that schema is renamed in the footer before pyarrow sees it. What is read are Parquet's own types.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from ray_diffsynth.errors import UserError

MAGIC = b"PAR1"
TAIL_BYTES = 64 << 10
"""What is fetched at once for the footer."""
_ARROW_SCHEMA, _SET_ASIDE = b"ARROW:schema", b"ARROW_schema"
_EXTENSION, _NAMED = b"ARROW:extension:name", b"ARROW:extension_name"
"""Of one length each, so that all offsets stay."""


class ColumnError(UserError, ValueError):
    """A Parquet file has columns that are no plain data, or others than expected; none of its values was read."""


def open_parquet(source: pa.NativeFile, path: str, expected: pa.Schema | None = None) -> pq.ParquetFile:
    """The Parquet file in `source`, a seekable file; `path` is its name for messages. The caller closes both.

    Strings and binaries come with 32-bit offsets, dictionaries as their values. `expected`: see `check_schema`; None
    allows any columns.

    Raises ColumnError for an extension type anywhere in its schema, whether its name is registered or not, and for
    columns that are not those expected; OSError and pa.ArrowException for a file that is damaged or no Parquet.
    """
    footer = _footer(source)
    small = pa.BufferReader(MAGIC + footer + len(footer).to_bytes(4, "little") + MAGIC)
    with small, pq.ParquetFile(small, arrow_extensions_enabled=False) as only_footer:
        metadata = only_footer.metadata
    _refuse_extensions(_arrow_schema(metadata), path)
    # The footer that was looked at, not another one that a store may give now.
    parquet = pq.ParquetFile(source, metadata=metadata, arrow_extensions_enabled=False)
    _refuse_extensions(parquet.schema_arrow, path)
    if expected is not None:
        check_schema(parquet.schema_arrow, expected, path)
    return parquet


def check_schema(found: pa.Schema, expected: pa.Schema, path: str) -> None:
    """Raise ColumnError unless names, their order and types are those expected.

    Types that Parquet stores alike (string and large_string, a dictionary and its values) count as equal.
    """
    if found.names != expected.names:
        held, wanted = ", ".join(found.names), ", ".join(expected.names)
        raise ColumnError(f"{path} has the columns {held or '(none)'}, not {wanted}; it was written by another program")
    for here, wanted in zip(found, expected, strict=True):
        if _stored(here.type) != _stored(wanted.type):
            raise ColumnError(
                f"{path}: the column {here.name!r} is {here.type}, not {wanted.type}; it was written by another program"
            )


def _footer(source: pa.NativeFile) -> bytes:
    """The footer's Thrift bytes, without the stored Arrow schema's name. Raises pa.ArrowInvalid."""
    size = source.size()
    tail = _read_last(source, size, min(size, TAIL_BYTES))
    if tail[-4:] == b"PARE":
        raise pa.ArrowInvalid("its footer is encrypted; write it without encryption")
    if len(tail) < 12 or tail[-4:] != MAGIC:
        raise pa.ArrowInvalid("Parquet magic bytes not found at its end; it is cut short, or no Parquet file")
    length = int.from_bytes(tail[-8:-4], "little")
    if not 0 < length <= size - 12:
        raise pa.ArrowInvalid(f"a footer of {length} bytes does not fit into its {size} bytes")
    if length + 8 > len(tail):
        tail = _read_last(source, size, length + 8)
    return tail[-8 - length : -8].replace(_ARROW_SCHEMA, _SET_ASIDE)


def _read_last(source: pa.NativeFile, size: int, count: int) -> bytes:
    source.seek(size - count)
    data: bytes = source.read(count)
    if len(data) != count:
        raise pa.ArrowInvalid("it became shorter while it was read")
    return data


def _arrow_schema(metadata: pq.FileMetaData) -> pa.Schema:
    """The stored Arrow schema with the extension types as their storage, their names in the fields' metadata.

    Empty where there is none, or none that can be read: nothing but the message of a refusal depends on it.
    """
    try:
        text = base64.b64decode((metadata.metadata or {}).get(_SET_ASIDE, b""))
        return pa.ipc.read_schema(pa.py_buffer(text.replace(_EXTENSION, _NAMED)))
    except (binascii.Error, pa.ArrowException, OSError, ValueError):
        return pa.schema([])


def _refuse_extensions(schema: pa.Schema, path: str) -> None:
    for column in schema:
        for inner in _nested(column):
            name = (inner.metadata or {}).get(_NAMED)
            if name is None and not isinstance(inner.type, pa.BaseExtensionType):
                continue
            shown = name.decode(errors="backslashreplace") if name is not None else inner.type.extension_name
            stored = inner.type if name is not None else inner.type.storage_type
            raise ColumnError(
                f"{path}: the column {column.name!r} holds the extension type {shown!r}, whose values only its own "
                f"program's code can read, so none is read; write the column as plain {stored}, or leave it out"
            )


def _nested(column: pa.Field) -> Iterator[pa.Field]:
    """A field and all fields below it."""
    fields = [column]
    while fields:
        inner = fields.pop()
        yield inner
        held = inner.type
        if isinstance(held, pa.DictionaryType | pa.RunEndEncodedType):
            fields.append(pa.field(inner.name, held.value_type))
        else:
            fields += [held.field(at) for at in range(held.num_fields)]


def _stored(held: pa.DataType) -> pa.DataType:
    """The type as Parquet stores it."""
    if pa.types.is_dictionary(held):
        return _stored(held.value_type)
    if pa.types.is_large_string(held) or pa.types.is_string_view(held):
        return pa.string()
    if pa.types.is_large_binary(held) or pa.types.is_binary_view(held):
        return pa.binary()
    if pa.types.is_list(held) or pa.types.is_large_list(held) or pa.types.is_fixed_size_list(held):
        return pa.list_(_stored(held.value_type))
    if pa.types.is_struct(held):
        return pa.struct([(field.name, _stored(field.type)) for field in held])
    return held
