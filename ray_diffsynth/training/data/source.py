"""Where samples come from: the cache of stage 1, or, unsplit, the images themselves. Both in the same order."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Protocol, TypeVar

import torch

from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.data.buckets import Bucket, rows_per_shard
from ray_diffsynth.data.dataset import read_dataset
from ray_diffsynth.data.fit import Fits
from ray_diffsynth.data.samples import ERRORS_OF_ALL_SAMPLES, bucket_of, load_inputs, size_fits
from ray_diffsynth.data.scan import SourceFile, scan_file
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.data.video_stream import require_video_support
from ray_diffsynth.data.warnings import about, warn
from ray_diffsynth.diffusion.transfer import map_tensors
from ray_diffsynth.errors import UserError
from ray_diffsynth.plan.cache_check import SourceError as SourceError
from ray_diffsynth.training.data.decode_check import CHECKED_IMAGES, CHECKED_VIDEOS, MACHINE_ERRORS, undecodable
from ray_diffsynth.training.data.epoch_order import open_shards

T = TypeVar("T")
R = TypeVar("R")


class SampleSource(Protocol):
    """Samples by index row, sorted by bucket.

    sample_ids: one a row. buckets: name -> its rows. identity: hash of what is trained on, for checkpoints.
    """

    sample_ids: Sequence[str]
    buckets: Mapping[str, range]
    identity: str

    def fetch(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The parameters of each row. Called from several threads."""
        ...

    def empty_caption(self) -> Mapping[str, Any]:
        """What takes the place of a sample's caption when it is dropped. Called from several threads."""
        ...


def shard_sizes(buckets: Iterable[str]) -> dict[str, int]:
    """Bucket name -> rows that lie together in the cache, as stage 1 cuts them."""
    return {name: rows_per_shard(Bucket.parse(name)) for name in buckets}


class CacheSource:
    """Samples from a committed cache. Tensors in the dtype that it was encoded in come in `dtype`, that of training."""

    def __init__(self, reader: CacheReader, dtype: torch.dtype) -> None:
        self.reader = reader
        self._encoded: torch.dtype = getattr(torch, reader.manifest.dtype)
        self._dtype = dtype
        self.sample_ids: Sequence[str] = reader.sample_ids
        self.buckets: Mapping[str, range] = reader.buckets
        self.identity = reader.identity
        self._empty: Mapping[str, Any] | None = None

    def fetch(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [{name: self._cast(value) for name, value in row.items()} for row in self.reader.read(rows)]

    def keep_open_for(self, virtual_ranks: int) -> None:
        """Keep in memory what so many virtual ranks read at a time, however large the shards are.

        Otherwise each shard would be read again and again.
        """
        self.reader.keep_at_least = open_shards(virtual_ranks) * len(self.reader.manifest.groups)

    def empty_caption(self) -> Mapping[str, Any]:
        if self._empty is None:
            values = {name: self._cast(value) for name, value in self.reader.read_empty().items()}
            self._empty = {name: value for name, value in values.items() if name in self.reader.manifest.parameters}
        return self._empty

    def _cast(self, value: Any) -> Any:
        # What a unit keeps in another dtype on purpose stays as it is.
        return map_tensors(lambda tensor: tensor.to(self._dtype) if tensor.dtype == self._encoded else tensor, value)


def _scanned(path: str, spec: SampleSpec) -> SourceFile:
    return scan_file(path, animations=spec.size.video, max_bytes=spec.max_decode_bytes)


class DatasetSource:
    """Images and metadata, decoded when they are asked for (`--task sft`), in the order of a cache's index.

    Rows that cannot be used (no image, smaller than a bucket, damaged, …) are left out, warned of and counted in
    `rejected`, as stage 1 does. Up to `CHECKED_IMAGES` samples all are decoded first; in a larger dataset a damaged
    one is replaced when it is reached, by the next of its bucket that can be decoded: the same on any worker.
    """

    def __init__(self, spec: SampleSpec, metadata_path: str | None) -> None:
        self.spec = spec
        metadata = read_dataset(spec, metadata_path)
        self.rejected: list[tuple[str, str]] = [(row.sample_id, row.message) for row in metadata.rejected]
        rows = list(metadata.rows())
        require_video_support(path for row in rows for param in spec.file_params for path in spec.paths(row, param))
        found: list[tuple[Bucket, dict[str, Any], list[str]]] = []
        fits = Fits()
        for row in rows:
            try:
                files = {param: [_scanned(path, spec) for path in spec.paths(row, param)] for param in spec.file_params}
                bucket = bucket_of(files, spec)
            except ERRORS_OF_ALL_SAMPLES:
                raise
            except UserError as error:
                self.rejected.append((row["sample_id"], str(error)))
                continue
            fits.add(row["sample_id"], size_fits(files, bucket, spec))
            found.append((bucket, row, [file.digest for found in files.values() for file in found]))
        fits.warn_all()
        if len(found) <= (CHECKED_VIDEOS if spec.size.video else CHECKED_IMAGES):
            bad = undecodable(found, lambda item: load_inputs(item[1], item[0], spec))
            self.rejected += [(found[position][1]["sample_id"], why) for position, why in bad.items()]
            found = [item for position, item in enumerate(found) if position not in bad]
        for sample_id, reason in self.rejected:
            warn("row_left_out", sample_id, reason)
        if not found:
            first = "; the first, " + ": ".join(self.rejected[0]) if self.rejected else ""
            raise SourceError(f"{spec.base_path} has no usable sample ({len(self.rejected)} rejected{first})")
        found.sort(key=lambda item: item[0].sort_key)  # stable: dataset order within a bucket
        self.sample_ids: Sequence[str] = [row["sample_id"] for _, row, _ in found]
        self.buckets: Mapping[str, range] = _ranges([bucket.name for bucket, _, _ in found])
        self._rows = [(bucket, row) for bucket, row, _ in found]
        content = [[bucket.name, {name: str(v) for name, v in row.items()}, digests] for bucket, row, digests in found]
        self.identity = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def fetch(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [self._decoded(row) for row in rows]

    def _decoded(self, index: int) -> dict[str, Any]:
        """The sample of a row, or the next of its bucket that can be decoded. Raises SourceError if none can."""
        bucket = self.buckets[self._rows[index][0].name]
        first = ""
        for step in range(len(bucket)):
            size, row = self._rows[bucket[(index - bucket.start + step) % len(bucket)]]
            try:
                with about(row["sample_id"]):
                    return load_inputs(row, size, self.spec)
            except MACHINE_ERRORS:
                raise
            except Exception as error:
                warn("sample_replaced", row["sample_id"], str(error) or type(error).__name__)
                first = first or f"{row['sample_id']}: {error}"
        raise SourceError(f"none of the {len(bucket)} samples of one size can be decoded any more; {first}")

    def empty_caption(self) -> Mapping[str, Any]:
        return {"prompt": ""}


def _ranges(names: Sequence[str]) -> dict[str, range]:
    ranges: dict[str, range] = {}
    for position, name in enumerate(names):
        ranges[name] = range(ranges[name].start if name in ranges else position, position + 1)
    return ranges


def prefetch(items: Iterable[T], fetch: Callable[[T], R], *, depth: int, threads: int) -> Generator[tuple[T, R]]:
    """`(item, fetch(item))` in order, with up to `depth` fetches under way or waiting on `threads` threads.

    An error of `fetch` is raised where its item would have come. Close the iterator, or exhaust it, to end the threads.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    pending: deque[tuple[T, Future[R]]] = deque()
    source = iter(items)
    try:
        for item in source:
            # In the caller's context: warnings of the data go where it collects them.
            pending.append((item, pool.submit(copy_context().run, fetch, item)))
            if len(pending) > depth:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
