"""Rows of Parquet; images that lie in the file, as `datasets` writes them, are named by their place and not read."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_diffsynth import storage
from ray_diffsynth.data.formats.raw import DatasetError, RawRow, RawTable, what_it_is
from ray_diffsynth.errors import UserError
from ray_diffsynth.storage.parquet import open_parquet

BLOCK_BYTES = 1 << 16
"""What is fetched beside what is asked for of a remote file: its columns of images are not read."""
FEWEST_ROWS_IN_DOUBT = 1_000_000
"""Rows up to which a file may have any number of them; a larger one has at least a bit for each, or is no dataset."""

FEWEST_BYTES_IN_DOUBT = 1 << 30
MAX_EXPANSION = 1000
"""Bytes up to which columns may have been compressed by any factor, and the largest factor of more."""


@dataclass(frozen=True)
class ImageColumn:
    """A column of `{bytes, path}`, or of lists of these: the number of its leaf of bytes, the name of that of paths."""

    leaf: int
    paths: str | None
    is_list: bool


def read_parquet(path: str) -> RawTable:
    """One row a sample, of plain columns and of images as `{bytes, path}`.

    An image is given as the place of its bytes in the file, or as its path where the file holds no bytes.
    Raises ColumnError for an extension type, before any value is read.
    """
    try:
        with storage.open_input(path, block_size=BLOCK_BYTES) as file, open_parquet(file, path) as parquet:
            columns: list[str] = parquet.schema_arrow.names
            if repeated := sorted({name for name in columns if columns.count(name) > 1}):
                raise DatasetError(f"{path}: the column {repeated[0]!r} appears twice; rename one")
            if parquet.metadata.num_rows > max(FEWEST_ROWS_IN_DOUBT, 8 * file.size()):
                raise DatasetError(
                    f"{path} claims {parquet.metadata.num_rows} rows in {file.size()} bytes, so that no two of them "
                    "could differ; it is damaged or hostile"
                )
            images = image_columns(parquet)
            _check_expansion(path, parquet, {image.leaf for image in images.values()}, file.size())
            read = [name for name in columns if name not in images]
            read += [image.paths for image in images.values() if image.paths is not None]
            table = parquet.read(columns=read if images else None)
            values = table.to_pylist() if read else [{} for _ in range(parquet.metadata.num_rows)]
            for name, image in images.items():
                for row, place in enumerate(_places(path, name, image, parquet, [value.get(name) for value in values])):
                    values[row][name] = place
    except FileNotFoundError as error:
        raise DatasetError(f"the metadata file {path} does not exist; check --dataset_metadata_path") from error
    except UserError:
        raise
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        # ValueError: bytes that are no text, a date that Python has none for
        why = what_it_is(path)
        raise DatasetError(
            f"{path} is {why}" if why else f"{path} is not a readable Parquet file: {error}; write it again"
        ) from error
    rows = (RawRow(n, f"{path}#{n}", {name: row[name] for name in columns}) for n, row in enumerate(values, 1))
    return RawTable(tuple(columns), tuple(rows))


def _check_expansion(path: str, parquet: pq.ParquetFile, images: Collection[int], size: int) -> None:
    """Raise DatasetError for columns that by the footer become far more than the file, before they are read."""
    metadata = parquet.metadata
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    expanded = sum(
        group.column(at).total_uncompressed_size
        for group in groups
        for at in range(group.num_columns)
        if at not in images
    )
    if expanded > max(FEWEST_BYTES_IN_DOUBT, MAX_EXPANSION * size):
        raise DatasetError(
            f"{path} would become {expanded / 2**30:.1f} GiB, {expanded // max(size, 1)} times its size; it is damaged "
            "or hostile: write the columns that are needed into another file"
        )


def image_columns(parquet: pq.ParquetFile) -> Mapping[str, ImageColumn]:
    """The columns of images, by name."""
    leaves = {parquet.schema.column(at).path: at for at in range(len(parquet.schema))}
    found = {}
    for column in parquet.schema_arrow:
        held, is_list = column.type, pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        if is_list:
            held = held.value_type
        names = {field.name for field in held} if pa.types.is_struct(held) else set()
        if "bytes" not in names or not names <= {"bytes", "path"} or not pa.types.is_binary(held.field("bytes").type):
            continue
        depth = 3 if is_list else 1
        own = [leaf for leaf in leaves if leaf.startswith(f"{column.name}.")]
        by_name = {leaf.rpartition(".")[2]: leaf for leaf in own if leaf.count(".") == column.name.count(".") + depth}
        found[column.name] = ImageColumn(leaves[by_name["bytes"]], by_name.get("path"), is_list)
    return found


def _places(path: str, name: str, image: ImageColumn, parquet: pq.ParquetFile, values: Sequence[Any]) -> Iterator[Any]:
    """For each row the place of its image in the file, or what its value says where the file has no bytes."""
    row = 0
    for group in range(parquet.metadata.num_row_groups):
        column = parquet.metadata.row_group(group).column(image.leaf)
        statistics = column.statistics
        empty = statistics is not None and statistics.has_null_count and statistics.null_count == column.num_values
        for value in values[row : row + parquet.metadata.row_group(group).num_rows]:
            if image.paths is not None and value is None:
                yield None
            elif image.is_list:
                entries = value if isinstance(value, list) else []
                yield [_place(path, row, image, at, _path_of(entry), empty) for at, entry in enumerate(entries)]
            else:
                yield _place(path, row, image, None, _path_of(value), empty)
            row += 1


def _path_of(value: Any) -> str | None:
    path = value.get("path") if isinstance(value, dict) else None
    return path if isinstance(path, str) else None


def _place(path: str, row: int, image: ImageColumn, item: int | None, given: str | None, empty: bool) -> str | None:
    """`empty`: no row of this group has bytes, so that the image is the file at its path."""
    if empty:
        return given
    name = posixpath.basename((given or "").replace("\\", "/")) or (f"{row}" if item is None else f"{row}-{item}")
    return storage.member_path(path, (row, image.leaf, *([] if item is None else [item])), name)
