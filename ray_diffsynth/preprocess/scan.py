"""The scan: every source file's header and content hash, so that each row has bucket and keys before it is decoded.

A file whose stamp (size, times and inode, or ETag) equals that of the last scan is not read again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from ray_diffsynth.cluster.environment import Environment, Parcel, call
from ray_diffsynth.cluster.nodes import Process
from ray_diffsynth.data.media import MAX_DECODE_BYTES, SourceUnavailable, StoreFailure, source_stamp
from ray_diffsynth.data.metadata import Metadata, Quarantined, resolve_file
from ray_diffsynth.data.rows import BATCH_ROWS
from ray_diffsynth.data.samples import ERRORS_OF_ALL_SAMPLES
from ray_diffsynth.data.scan import SourceFile, scan_file
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.data.stamps import listed_stamps
from ray_diffsynth.data.video_stream import require_video_support
from ray_diffsynth.errors import UserError
from ray_diffsynth.preprocess.assign import Assigner, Scanned, names_of
from ray_diffsynth.preprocess.key_columns import Keys, hashed, positions
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.samples import Samples
from ray_diffsynth.preprocess.scan_cache import ScanCache
from ray_diffsynth.preprocess.stamp_table import StampTable
from ray_diffsynth.storage import join
from ray_diffsynth.urls import is_remote

logger = logging.getLogger(__name__)

FILES_PER_TASK = 64
REMOTE_FILES = 8
"""Remote files that a task reads at a time, which it mostly waits for."""
STAMP_THREADS = 32
"""Questions at once to the storage, which mostly wait."""
MAX_PENDING_TASKS = 512
"""Scan tasks that wait or run at once: the driver's memory must not grow with the dataset."""


@dataclass(frozen=True, slots=True)
class Unchecked:
    """A file as it was at the last scan, since its storage cannot be asked now whether it has changed, and why not."""

    file: SourceFile
    reason: str


def scan_files(
    paths: Sequence[str],
    known: Mapping[str, SourceFile],
    animations: bool = False,
    max_bytes: int = MAX_DECODE_BYTES,
    stamps: Mapping[str, str] | None = None,
) -> list[Scanned | Unchecked | StoreFailure]:
    """Scan each path; a file with the stamp that `known` has of it is taken from there. Errors are values.

    `stamps`: of files whose stamps have been listed. A known file whose stamp cannot be asked stays. Where the store
    fails for another, the list ends with that: what is scanned before it is not lost, and what is after it is not asked
    for (of remote files, which are read some at a time, little). Raises StorageError and VideoSupportError.
    """
    stamps = stamps or {}

    def scan(path: str) -> Scanned | Unchecked | StoreFailure:
        try:
            return _scan(path, known.get(path), stamps.get(path), animations, max_bytes)
        except StoreFailure as error:
            return error

    found: list[Scanned | Unchecked | StoreFailure] = []
    with ThreadPoolExecutor(REMOTE_FILES) as threads:
        results = threads.map(scan, paths) if any(map(is_remote, paths)) else map(scan, paths)
        for result in results:
            found.append(result)
            if isinstance(result, StoreFailure):
                threads.shutdown(wait=False, cancel_futures=True)
                break
    return found


def _scan(
    path: str, known: SourceFile | None, stamp: str | None, animations: bool, max_bytes: int
) -> Scanned | Unchecked:
    try:
        if known is not None and known.stamp:
            try:
                if known.stamp == (stamp or source_stamp(path)):
                    return known
            except (SourceUnavailable, StoreFailure) as error:
                return Unchecked(known, str(error))
        return scan_file(path, stamp=stamp or None, animations=animations, max_bytes=max_bytes)
    except ERRORS_OF_ALL_SAMPLES:
        raise
    except UserError as error:
        return Failure.of(error)


def scan_dataset(
    metadata: Metadata,
    spec: SampleSpec,
    cache: str,
    *,
    process: Callable[[], Process],
    environment: Environment | None = None,
    stamps_here: bool = False,
    remember: bool = True,
    on_progress: Callable[[int], None] = lambda n: None,
) -> tuple[Samples, list[Quarantined]]:
    """The samples, and the rows that cannot be used with their reason. Ray tasks read the files.

    process: what a task reserves, and where; asked when there is something for one to do. stamps_here: this process
    looks for what has changed since the last scan also where no listing tells that, as no machine is up for it. What is
    read is remembered as it goes, so that a run which ends on the way need not read it again. Raises StoreFailure where
    a store fails for a file that is not known, or has changed; StorageError and VideoSupportError where a machine lacks
    what it needs.
    """
    assigner = Assigner(spec, metadata.columns)
    batches = metadata.table.to_batches(max_chunksize=BATCH_ROWS)
    shared = _shared(assigner, batches)
    scan_cache = ScanCache(cache, remember=remember)
    # Of all at once: a listing of a part of them might go over all.
    stamps = StampTable(listed_stamps(_remote(assigner, batches)))
    scanner = _Scanner(spec, scan_cache, stamps, process, environment, stamps_here, on_progress)
    ahead: list[tuple[pa.RecordBatch, _Asked]] = []

    def assign() -> None:
        batch, asked = ahead.pop()
        found = scanner.take(asked)
        shared.update((name, found[name]) for name in found if name in shared)
        assigner.add(batch, found)

    for batch in batches:
        if ahead and shared:  # of which some may be asked for just now
            assign()
        # Each file is read once, though several rows name it: in the same batch mostly, else it is in `shared`.
        names = dict.fromkeys(name for values in assigner.names(batch).values() for v in values for name in names_of(v))
        asked = scanner.ask({name: shared.get(name) for name in names})
        if ahead:
            assign()
        ahead.append((batch, asked))
    if ahead:
        assign()
    scanner.finish()
    return assigner.finish(), assigner.bad


def _remote(assigner: Assigner, batches: Sequence[pa.RecordBatch]) -> Iterator[str]:
    """The URLs of the dataset's files that lie on a store."""
    base = assigner.spec.base_path
    for batch in batches:
        names = {name for values in assigner.names(batch).values() for value in values for name in names_of(value)}
        yield from (resolve_file(base, name) for name in names if is_remote(join(base, name)))


def _shared(assigner: Assigner, batches: Sequence[pa.RecordBatch]) -> dict[str, Scanned | None]:
    """The files that rows of several batches name. Raises VideoSupportError, before anything is read."""
    seen: list[Keys] = []
    for batch in batches:
        names = {name for values in assigner.names(batch).values() for value in values for name in names_of(value)}
        require_video_support(names)
        seen.append(hashed(names))
    hashes, counts = np.unique(np.concatenate([*seen, hashed([])]), return_counts=True)
    several = hashes[counts > 1]
    if not len(several):
        return {}
    return {
        name: None
        for batch in batches
        for values in assigner.names(batch).values()
        for name in {name for value in values for name in names_of(value)}
        if positions(hashed([name]), several)[0] >= 0
    }


@dataclass
class _Asked:
    """Files that are being scanned: what is known of each name; the path of each other; and of each path what was known
    before, the stamp that a listing told, and what was found, which is whole when no task is pending."""

    names: Mapping[str, Scanned | None]
    places: Mapping[str, str]
    known: Mapping[str, SourceFile]
    stamps: Mapping[str, str]
    files: dict[str, Scanned] = field(default_factory=dict)
    pending: int = 0


class _Scanner:
    """Scans files, those of the last scan by their stamps alone, in Ray tasks of a few files each."""

    def __init__(
        self,
        spec: SampleSpec,
        scan_cache: ScanCache,
        stamps: StampTable,
        process: Callable[[], Process],
        environment: Environment | None,
        stamps_here: bool,
        on_progress: Callable[[int], None],
    ) -> None:
        self.spec, self.scan_cache, self.stamps, self.process = spec, scan_cache, stamps, process
        self.stamps_here, self.on_progress = stamps_here, on_progress
        self._scan_files = Parcel(environment, scan_files)
        self._pending: deque[tuple[_Asked, Sequence[str], Any]] = deque()
        self._unchecked: list[str] = []
        self._task: Any = None

    def ask(self, names: Mapping[str, Scanned | None]) -> _Asked:
        """Begin to scan the files of these names, of which some may be known; as many tasks as may be pending."""
        places = {name: resolve_file(self.spec.base_path, name) for name, known in names.items() if known is None}
        paths = list(dict.fromkeys(places.values()))
        asked = _Asked(names, places, self.scan_cache.known(paths), self.stamps.of(paths))
        asked.files |= {path: file for path, file in asked.known.items() if asked.stamps.get(path) == file.stamp}
        if self.stamps_here:
            asked.files |= unchanged({path: f for path, f in asked.known.items() if path not in asked.stamps})
        if asked.files:
            self.on_progress(len(asked.files))
            paths = [path for path in paths if path not in asked.files]
        for start in range(0, len(paths), FILES_PER_TASK):
            while len(self._pending) >= MAX_PENDING_TASKS:
                self._take()
            part = paths[start : start + FILES_PER_TASK]
            self._pending.append((asked, part, self._begin(asked, part)))
            asked.pending += 1
        return asked

    def take(self, asked: _Asked) -> dict[str, Scanned]:
        """What the files of the names are, when they are scanned. Raises StoreFailure, and what `scan_files` raises."""
        while asked.pending:
            self._take()
        return {name: known or asked.files[asked.places[name]] for name, known in asked.names.items()}

    def _begin(self, asked: _Asked, part: Sequence[str]) -> Any:
        if self._task is None:
            self._task = ray.remote(**self.process().ray_options, max_retries=1)(call)
        known = {path: asked.known[path] for path in part if path in asked.known}
        stamps = {path: asked.stamps[path] for path in part if path in asked.stamps}
        return self._task.remote(
            self._scan_files, part, known, self.spec.size.video, self.spec.max_decode_bytes, stamps
        )

    def _take(self) -> None:
        asked, part, reference = self._pending.popleft()
        results = _result(part, reference, lambda some: self._begin(asked, some))
        asked.pending -= 1
        for path, found in zip(part, results, strict=False):
            if isinstance(found, Unchecked):
                self._unchecked.append(found.reason)
                asked.files[path] = found.file
            elif not isinstance(found, StoreFailure):
                asked.files[path] = found
        self.scan_cache.add({path: asked.files[path] for path in part if path in asked.files}, asked.known)
        if failures := [found for found in results if isinstance(found, StoreFailure)]:
            self.scan_cache.save()
            raise failures[0]
        self.on_progress(len(part))

    def finish(self) -> None:
        """When all is scanned: remember it, and warn of what could not be asked."""
        self.scan_cache.finish()
        if self._unchecked:
            logger.warning(
                "%d files are taken as they were at the last scan, since it cannot be asked now whether they have "
                "changed (the first: %s); run again to have them checked",
                *(len(self._unchecked), self._unchecked[0]),
            )


def unchanged(known: Mapping[str, SourceFile]) -> dict[str, SourceFile]:
    """Those of the files whose stamp is that of the last scan; what cannot be asked is not among them."""

    def same(file: SourceFile) -> bool:
        try:
            return bool(file.stamp) and source_stamp(file.path) == file.stamp
        except UserError:  # gone, or out of reach for the moment
            return False

    with ThreadPoolExecutor(STAMP_THREADS) as threads:
        return {path: known[path] for path, kept in zip(known, threads.map(same, known.values()), strict=True) if kept}


def _result(
    part: Sequence[str], reference: Any, begin: Callable[[Sequence[str]], Any]
) -> list[Scanned | Unchecked | StoreFailure]:
    """What a task found. If it died, each of its files is scanned by a task of its own, to find the one that kills."""
    try:
        found: list[Scanned | Unchecked | StoreFailure] = ray.get(reference)
    except RayError as error:
        if isinstance(error, RayTaskError) and isinstance(error.cause, ERRORS_OF_ALL_SAMPLES):
            raise error.cause from None
        if len(part) > 1:
            alone = [(path, begin([path])) for path in part]
            return [_result([path], reference, begin)[0] for path, reference in alone]
        if isinstance(error, RayTaskError):
            return [Failure(type(error.cause).__name__, f"{part[0]}: {error.cause}")]
        why = f"{part[0]}: the process that reads its header died each time ({type(error).__name__})"
        return [Failure("ScannerDied", why)]
    return found
