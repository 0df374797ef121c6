"""From what the scan found of the files to samples with their buckets, or the reasons that rows cannot be used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.data.fit import Fits
from ray_diffsynth.data.metadata import Quarantined
from ray_diffsynth.data.rows import SAMPLE_ID, RowColumns
from ray_diffsynth.data.samples import bucket_of, decode_bytes, pixel_keys, size_fits
from ray_diffsynth.data.scan import SourceFile
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.errors import UserError
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.samples import Samples, SampleWriter

Scanned = SourceFile | Failure


class Assigner:
    """Gives every row its bucket and what its files are in the cache keys, or its reason for quarantine."""

    def __init__(self, spec: SampleSpec, columns: RowColumns) -> None:
        self.spec, self.columns = spec, columns
        self.bad: list[Quarantined] = []
        self._writer = SampleWriter(spec, columns)
        self._fits = Fits()

    def names(self, batch: pa.RecordBatch) -> dict[str, list[Any]]:
        """File parameter -> the file that each row names, or its list of files."""
        return {param: self.columns.values(batch, self.spec.columns[param]) for param in self.spec.file_params}

    def add(self, batch: pa.RecordBatch, files: Mapping[str, Scanned]) -> None:
        """The next rows of the dataset, with what is known of `files` by the names in the rows."""
        spec, values = self.spec, self.names(batch)
        numbers: defaultdict[Bucket, list[int]] = defaultdict(list)
        keys: defaultdict[Bucket, dict[str, list[Any]]] = defaultdict(lambda: {param: [] for param in spec.file_params})
        memories: defaultdict[Bucket, list[tuple[int, int]]] = defaultdict(list)
        for number, sample_id in enumerate(batch.column(SAMPLE_ID).to_pylist()):
            row = {param: values[param][number] for param in spec.file_params}
            found = {param: [files[name] for name in names_of(value)] for param, value in row.items()}
            # As the dataset writes it: the same data under another folder gives the same index.
            source = str(row[spec.file_params[0]]) if spec.file_params else ""
            failure = next((item for items in found.values() for item in items if isinstance(item, Failure)), None)
            try:
                if failure is None:
                    good = {
                        param: [item for item in items if isinstance(item, SourceFile)]
                        for param, items in found.items()
                    }
                    bucket = bucket_of(good, spec)
                    key = pixel_keys({spec.columns[param]: value for param, value in row.items()}, good, bucket, spec)
                    memory = decode_bytes(good, bucket, spec)
                    self._fits.add(sample_id, size_fits(good, bucket, spec))
                    numbers[bucket].append(number)
                    memories[bucket].append(memory)
                    for param, value in key.items():
                        keys[bucket][param].append(value)
            except UserError as error:
                failure = Failure.of(error)
            if failure is not None:
                self.bad.append(Quarantined(sample_id, source, failure.error, failure.message))
        for bucket, some in numbers.items():
            self._writer.add(bucket, batch.take(pa.array(some, pa.int32())), keys[bucket], memories[bucket])

    def finish(self) -> Samples:
        """All samples in the order of training. Warns of what is enlarged, cut or left aside."""
        self._fits.warn_all()
        return self._writer.finish()


def names_of(value: Any) -> list[Any]:
    """The files that a row names for a parameter, as it names them."""
    return value if isinstance(value, list) else [value]
