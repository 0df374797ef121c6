"""The good rows of a dataset: on the local disk by bucket, in the order of training; in memory, a few bytes a part."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.data.metadata import Quarantined
from ray_diffsynth.data.rows import FILES, SAMPLE_ID, RowColumns
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.preprocess.key_columns import Numbers
from ray_diffsynth.preprocess.records import Sample
from ray_diffsynth.storage.spool import Spool

PART_ROWS = 4096
"""Rows of a part that is full."""
OPEN_ROWS = 32768
"""Rows that wait in memory until their part is full; above it the longest part is written as it is."""
PARTS_KEPT = 4
"""Parts that a reader keeps in memory."""


_MEMORY = ("\0decode_bytes", "\0kept_bytes")


def _key_column(param: str) -> str:
    return f"\0key of {param}"  # no column of a dataset


@dataclass(frozen=True, slots=True)
class SamplePart:
    """Samples of one bucket: the number of the first in the order of training, and their columns.

    `sources`: the value of the column of their target file, as the dataset writes it.
    """

    start: int
    bucket: Bucket
    batch: pa.RecordBatch
    sources: pa.Array

    @property
    def ids(self) -> pa.Array:
        """Their sample ids."""
        return self.batch.column(SAMPLE_ID)


class SampleWriter:
    """Takes in samples in the order of the dataset; `finish` gives all of them in the order of training."""

    def __init__(self, spec: SampleSpec, columns: RowColumns) -> None:
        keys = tuple(map(_key_column, spec.file_params))
        self.columns = RowColumns((*columns.names, *keys), columns.files | set(keys), columns.texts)
        self.spec = spec
        schema = self.columns.schema
        for name in _MEMORY:
            schema = schema.append(pa.field(name, pa.int64()))
        self._spool = Spool(schema)
        self._open: defaultdict[Bucket, list[pa.RecordBatch]] = defaultdict(list)
        self._rows: defaultdict[Bucket, int] = defaultdict(int)
        self._parts: defaultdict[Bucket, list[tuple[int, int]]] = defaultdict(list)

    def add(
        self,
        bucket: Bucket,
        rows: pa.RecordBatch,
        keys: Mapping[str, Sequence[Any]],
        memories: Sequence[tuple[int, int]],
    ) -> None:
        """Rows of one bucket, by the dataset's columns, and what `pixel_keys` gives for each file parameter of each.

        memories: `decode_bytes` and `kept_bytes` of each.
        """
        own = [self.columns.files_column(keys[param]) for param in self.spec.file_params]
        own += [pa.array(sizes, pa.int64()) for sizes in zip(*memories, strict=True)]
        batch = pa.RecordBatch.from_arrays([*rows.columns, *own], schema=self._spool.schema)
        self._open[bucket].append(batch)
        self._rows[bucket] += len(batch)
        if self._rows[bucket] >= PART_ROWS:
            self._write(bucket)
        while sum(self._rows.values()) > OPEN_ROWS:
            self._write(max(self._rows, key=lambda one: self._rows[one]))

    def _write(self, bucket: Bucket) -> None:
        batch = pa.concat_batches(self._open.pop(bucket))
        del self._rows[bucket]
        self._parts[bucket].append((self._spool.append(batch), len(batch)))

    def finish(self) -> Samples:
        """All samples: by bucket, in dataset order within each."""
        for bucket in list(self._open):
            self._write(bucket)
        order = sorted(self._parts, key=lambda bucket: bucket.sort_key)
        parts = [(bucket, number, rows) for bucket in order for number, rows in self._parts[bucket]]
        return Samples(self.spec, self.columns, self._spool, parts)


class Samples:
    """All samples by their numbers, which count them in the order of training."""

    def __init__(
        self, spec: SampleSpec, columns: RowColumns, spool: Spool, parts: Sequence[tuple[Bucket, int, int]]
    ) -> None:
        self.spec, self.columns, self._spool, self._parts = spec, columns, spool, parts
        self._starts = [0, *np.cumsum([rows for *_, rows in parts], dtype=np.int64).tolist()]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Sample]:
        return (sample for number in range(len(self._parts)) for sample in self.samples_of(self.part(number)))

    @property
    def buckets(self) -> dict[Bucket, int]:
        """How many samples each bucket has, in order."""
        counts: dict[Bucket, int] = {}
        for bucket, _, rows in self._parts:
            counts[bucket] = counts.get(bucket, 0) + rows
        return counts

    @property
    def names_of_buckets(self) -> dict[str, int]:
        """The same by the names of the buckets."""
        return {bucket.name: count for bucket, count in self.buckets.items()}

    def parts(self) -> Iterator[SamplePart]:
        """All samples, a part at a time."""
        return (self.part(number) for number in range(len(self._parts)))

    def part(self, number: int) -> SamplePart:
        """A part by its own number."""
        bucket, place, rows = self._parts[number]
        batch = self._spool[place]
        sources = pa.array([""] * rows, pa.string())
        if self.spec.file_params:
            sources = _as_written(batch.column(self.spec.columns[self.spec.file_params[0]]))
        return SamplePart(self._starts[number], bucket, batch, sources)

    def samples_of(self, part: SamplePart, numbers: Numbers | None = None) -> Iterator[Sample]:
        """The samples of a part; of them only those of some numbers, in their order, if given."""
        batch, sources, bucket, spec = part.batch, part.sources, part.bucket, self.spec
        if numbers is not None:
            places = pa.array(numbers - part.start)
            batch, sources = batch.take(places), sources.take(places)
        sizes = _sizes(bucket)
        memories = zip(*(batch.column(name).to_pylist() for name in _MEMORY), strict=True)
        for row, source, memory in zip(self.columns.rows(batch), sources.to_pylist(), memories, strict=True):
            keys = {param: row.pop(_key_column(param)) for param in spec.file_params}
            inputs = {param: row[column] for param, column in spec.columns.items() if param not in keys}
            yield Sample(row[SAMPLE_ID], source, row, bucket, inputs | sizes | keys, *memory)

    def inputs(self, names: Collection[str]) -> Iterator[dict[str, Any]]:
        """Of each sample the inputs of these names, as they enter a cache key; other columns are not read."""
        columns = {
            name: _key_column(name) if name in self.spec.file_params else self.spec.columns[name]
            for name in names
            if name in self.spec.columns
        }
        for part in self.parts():
            values = [self.columns.values(part.batch, column) for column in columns.values()]
            sizes = {name: value for name, value in _sizes(part.bucket).items() if name in names}
            for row in zip(*values, strict=True) if values else [()] * len(part.batch):
                yield dict(zip(columns, row, strict=True)) | sizes

    def reader(self) -> SampleReader:
        """Gives samples by their numbers."""
        return SampleReader(self)

    def place_of(self, number: int) -> int:
        """The number of the part that holds a sample."""
        return bisect_right(self._starts, number) - 1


@dataclass(frozen=True)
class ScannedRows:
    """All rows of a dataset after the scan: the good ones, and the others with their reason."""

    samples: Samples
    rejected: Sequence[Quarantined]
    total: int


class SampleReader:
    """Samples by their numbers; the parts that were used last stay in memory. For one thread."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self._kept: OrderedDict[int, SamplePart] = OrderedDict()

    def take(self, numbers: Numbers) -> list[Sample]:
        """The samples of these numbers, in their order; best in ascending order."""
        found: list[Sample] = []
        start = 0
        while start < len(numbers):
            place = self.samples.place_of(int(numbers[start]))
            part = self._part(place)
            within = (numbers[start:] >= part.start) & (numbers[start:] < part.start + len(part.batch))
            end = start + int(np.argmin(within)) if not within.all() else len(numbers)
            found += self.samples.samples_of(part, numbers[start:end])
            start = end
        return found

    def _part(self, place: int) -> SamplePart:
        if place not in self._kept:
            self._kept[place] = self.samples.part(place)
            while len(self._kept) > PARTS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(place)
        return self._kept[place]


def _sizes(bucket: Bucket) -> dict[str, int]:
    return {"height": bucket.height, "width": bucket.width, "num_frames": bucket.num_frames}


def _as_written(column: pa.Array) -> pa.Array:
    """A column of files (`FILES`) as texts: the path, or the list of paths as Python writes it."""
    if column.type != FILES:
        raise TypeError(f"a column of files is {FILES}, not {column.type}")
    paths, lists = column.field("paths"), column.field("is_list")
    if not lists.true_count:
        return paths.flatten()
    return pa.array([str(p) if many else p[0] for p, many in zip(paths.to_pylist(), lists.to_pylist(), strict=True)])
