"""Random access to the samples of a committed cache, by index row; row groups are kept while memory lasts."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import pyarrow as pa

from ray_diffsynth import storage
from ray_diffsynth.cache.codec import CodecError
from ray_diffsynth.cache.errors import CacheError as CacheError
from ray_diffsynth.cache.errors import UnreadableError, VersionError, repair_advice
from ray_diffsynth.cache.index import bucket_ranges
from ray_diffsynth.cache.inspection import check_files
from ray_diffsynth.cache.local_copy import LocalCopies
from ray_diffsynth.cache.manifest import committed
from ray_diffsynth.cache.names import shard_path
from ray_diffsynth.cache.schema import RowView, row_views
from ray_diffsynth.cache.store import READ_ERRORS, as_shard, failed_to_read


class _Strings(Sequence[str]):
    """An Arrow string column as a sequence: a million ids without a million Python objects."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._array = column.combine_chunks()

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        if isinstance(at, slice):
            return list(self._array.take(pa.array(range(len(self))[at], pa.int64())).to_pylist())
        return str(self._array[range(len(self))[at]].as_py())

    def __iter__(self) -> Iterator[str]:
        for scalar in self._array:
            yield scalar.as_py()


@dataclass(frozen=True)
class _RowGroup:
    """A row group in memory, still encoded; `checked` are the rows whose checksum was found to hold."""

    rows: Sequence[RowView]
    nbytes: int
    codec: str
    checked: set[int] = field(default_factory=set)


_Place = tuple[str, str, int]  # group, file, row group


class CacheReader:
    """The samples of a cache in training order: buckets by area, each in the order of the dataset.

    Several threads may read at once. `bytes_read` and `rows_read` count what came from files, `rows_served` the samples
    handed out: rows_read / (rows_served x groups) is the read amplification.

    keep_at_least: row groups that are kept whatever their size, for a reader that goes back and forth between so many.
    """

    def __init__(
        self,
        cache: str,
        *,
        verify: bool = True,
        max_cached_bytes: int = 512 << 20,
        copies: LocalCopies | None = None,
    ) -> None:
        """Open a committed cache. `verify` checks each row's checksum; `max_cached_bytes` bounds the kept row groups.

        `copies` keeps the files of a remote cache on this machine.

        Raises CacheError when there is none, or its index is damaged.
        """
        self.cache = storage.absolute(cache)
        self.verify = verify
        self.max_cached_bytes = max_cached_bytes
        self.keep_at_least = 1
        self._open_file = storage.open_input if copies is None else copies.open
        self.manifest, index = committed(self.cache)
        index = index.combine_chunks()
        self.identity = self.manifest.identity(index)
        self.sample_ids: Sequence[str] = _Strings(index.column("sample_id"))
        self.buckets: Mapping[str, range] = bucket_ranges(index)
        self.bytes_read = 0
        self.rows_read = 0
        self.rows_served = 0
        self._index = index
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Place, _RowGroup] = OrderedDict()
        self._kept_bytes = 0
        self._loading: defaultdict[_Place, threading.Lock] = defaultdict(threading.Lock)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def check_files(self) -> None:
        """Raise CacheError, with counts and the first names, if files of the cache are not there; none is opened."""
        check_files(self.cache, self.manifest, self._index)

    def read(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Parameter -> value of the samples at these index rows, in this order; the tensors are the caller's own.

        Each row group is read once for all the rows that lie in it. Raises IndexError for a row outside the index,
        CacheError naming the file for anything absent or damaged.
        """
        if wrong := [row for row in rows if not 0 <= row < len(self)]:
            raise IndexError(f"row {wrong[0]} is outside the index of {len(self)} samples")
        samples: list[dict[str, Any]] = [{} for _ in rows]
        for group in (spec.name for spec in self.manifest.groups):
            columns = [self._index.column(f"{group}_{name}") for name in ("key", "file", "row_group", "row")]
            wanted: defaultdict[_Place, list[tuple[int, str, int]]] = defaultdict(list)
            for position, row in enumerate(rows):
                key, file, row_group, at = (column[int(row)].as_py() for column in columns)
                wanted[group, file, row_group].append((position, key, at))
            for place, members in wanted.items():
                loaded = self._row_group(place)
                for position, key, at in members:
                    samples[position].update(self._values(place, loaded, key, at))
        with self._lock:
            self.rows_served += len(rows)
        return samples

    def read_empty(self) -> dict[str, Any]:
        """Parameters of the empty caption, which every group with a caption holds. Raises CacheError if none does."""
        values: dict[str, Any] = {}
        for spec in self.manifest.groups:
            if spec.empty_key is not None and spec.empty_at is not None:
                file, row_group, at = spec.empty_at
                place = (spec.name, file, row_group)
                values.update(self._values(place, self._row_group(place), spec.empty_key, at))
        if not values:
            raise CacheError(
                f"the cache {self.cache} holds no empty caption: nothing in it is made from the caption alone; train "
                "without --caption_dropout"
            )
        return values

    def _row_group(self, place: _Place) -> _RowGroup:
        with self._lock:
            loading = self._loading[place]
        # One thread reads a row group, the others wait for it instead of reading it too.
        with loading:
            with self._lock:
                if place in self._kept:
                    self._kept.move_to_end(place)
                    return self._kept[place]
            loaded = self._load(place)
            with self._lock:
                self.bytes_read += loaded.nbytes
                self.rows_read += len(loaded.rows)
                if place in self._kept:
                    # Another thread read it too: its lock was dropped with the row group in between.
                    self._kept_bytes -= self._kept.pop(place).nbytes
                self._kept[place] = loaded
                self._kept_bytes += loaded.nbytes
                self._evict(self.keep_at_least)
            return loaded

    def _evict(self, keep: int, incoming: int = 0) -> None:
        """Under the lock: drop what was not asked for longest, down to `keep` row groups, until `incoming` fits."""
        while self._kept_bytes + incoming > self.max_cached_bytes and len(self._kept) > keep:
            gone, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.nbytes
            self._loading.pop(gone, None)

    def _load(self, place: _Place) -> _RowGroup:
        group, file, row_group = place
        path = shard_path(self.cache, group, file)
        try:
            parameters = self.manifest.group(group).parameters
            with self._open_file(path) as source, as_shard(source, path, parameters) as (parquet, header):
                if not 0 <= row_group < parquet.num_row_groups:
                    raise CacheError(f"has {parquet.num_row_groups} row groups, not the row group {row_group}")
                with self._lock:  # before it is read: the new one and the old one need not be in memory together
                    self._evict(self.keep_at_least - 1, parquet.metadata.row_group(row_group).total_byte_size)
                table = parquet.read_row_group(row_group, use_threads=False)
                # The file's own codec: shards that an earlier run wrote with another one stay in use.
                return _RowGroup(row_views(table), table.nbytes, header["codec"])
        except FileNotFoundError as error:
            raise self._damage(place, "it is absent") from error
        except VersionError:
            raise
        except (CacheError, *READ_ERRORS) as error:
            if failed_to_read(error):
                raise UnreadableError(path, error) from error
            raise self._damage(place, str(error)) from error

    def _values(self, place: _Place, loaded: _RowGroup, key: str, at: int) -> dict[str, Any]:
        if not 0 <= at < len(loaded.rows):
            raise self._damage(place, f"its row group {place[2]} has {len(loaded.rows)} rows, not the row {at}")
        view = loaded.rows[at]
        if view.key != key:
            raise self._damage(place, f"row {at} has the key {view.key}, the index says {key}")
        if self.verify and at not in loaded.checked:
            if not view.is_intact(loaded.codec):
                raise self._damage(place, f"row {at} ({key}) does not match its checksum")
            loaded.checked.add(at)
        try:
            return view.decode(loaded.codec)
        except CodecError as error:
            raise self._damage(place, str(error)) from error

    def _damage(self, place: _Place, reason: str) -> CacheError:
        path = shard_path(self.cache, place[0], place[1])
        return CacheError(f"the cache file {path} cannot be used: {reason}; {repair_advice(self.cache)}")
