"""Record batches on the local disk of this machine, for what is too large to be kept in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pyarrow as pa

from ray_diffsynth.system_errors import naming_file


class Spool:
    """Record batches of one schema in a file of the temporary folder (TMPDIR), read back by their number.

    The file has no name, so that it is gone when the process ends, however that happens. Several threads may read.
    Raises OSError, which names the folder, where its disk is full.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._file = tempfile.TemporaryFile(prefix="ray-diffsynth-")  # noqa: SIM115 (as long as the object lives)
        self._places: list[tuple[int, int]] = []
        self._end = 0

    def __len__(self) -> int:
        return len(self._places)

    def append(self, batch: pa.RecordBatch) -> int:
        """Write a batch; its number."""
        data = batch.serialize()
        view = memoryview(data)
        with naming_file(tempfile.gettempdir()):
            while view:
                view = view[os.pwrite(self._file.fileno(), view, self._end + len(data) - len(view)) :]
        self._places.append((self._end, len(data)))
        self._end += len(data)
        return len(self._places) - 1

    def __getitem__(self, number: int) -> pa.RecordBatch:
        place, size = self._places[number]
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = os.preadv(self._file.fileno(), [view], place + size - len(view))
            if not count:
                raise OSError("the temporary file of the dataset's rows was cut short")
            view = view[count:]
        return pa.ipc.read_record_batch(pa.py_buffer(data), self.schema)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return (self[number] for number in range(len(self)))
