"""The scan: every source file's header and content hash, so that each row has bucket and keys before it is decoded.

A file whose stamp (size, times and inode, or ETag) equals that of the last scan is not read again.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ray_diffsynth.cluster.environment import Environment, Parcel, call
from ray_diffsynth.cluster.nodes import Process
from ray_diffsynth.data.fit import Fits
from ray_diffsynth.data.media import MAX_DECODE_BYTES, SourceUnavailable, StoreFailure, source_stamp
from ray_diffsynth.data.metadata import Metadata, Quarantined, resolve_file
from ray_diffsynth.data.samples import ERRORS_OF_ALL_SAMPLES, bucket_of, decode_bytes, pixel_keys, size_fits
from ray_diffsynth.data.scan import SourceFile, scan_file
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.data.stamps import listed_stamps
from ray_diffsynth.data.video_stream import require_video_support
from ray_diffsynth.errors import UserError
from ray_diffsynth.preprocess.records import Failure, Sample
from ray_diffsynth.preprocess.scan_cache import ScanCache
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


Scanned = SourceFile | Failure


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
) -> tuple[list[Sample], list[Quarantined]]:
    """Samples in dataset order, and the rows that cannot be used with their reason. Ray tasks read the files.

    process: what a task reserves, and where; asked when there is something for one to do. stamps_here: this process
    looks for what has changed since the last scan also where no listing tells that, as no machine is up for it. What is
    read is remembered as it goes, so that a run which ends on the way need not read it again. Raises StoreFailure where
    a store fails for a file that is not known, or has changed; StorageError and VideoSupportError where a machine lacks
    what it needs.
    """
    rows = list(metadata.rows())
    places = _places(rows, spec)
    paths = list(dict.fromkeys(places.values()))
    require_video_support(paths)
    scan_cache = ScanCache(cache, paths, remember=remember)
    files: dict[str, Scanned] = {}
    stamps: dict[str, str] = {}
    for path, stamp in listed_stamps(paths):
        before = scan_cache.files.get(path)
        if before is not None and stamp and before.stamp == stamp:
            files[path] = before
        else:
            stamps[path] = stamp
    if stamps_here:
        files |= unchanged(scan_cache.known(path for path in paths if path not in files and path not in stamps))
    if files:
        on_progress(len(files))
        paths = [path for path in paths if path not in files]
    task = ray.remote(**process().ray_options, max_retries=1)(call) if paths else None
    scan = Parcel(environment, scan_files)
    unchecked: list[Unchecked] = []
    pending: deque[tuple[list[str], Any]] = deque()

    def begin(part: Sequence[str]) -> Any:
        assert task is not None
        listed = {path: stamps[path] for path in part if path in stamps}
        return task.remote(scan, part, scan_cache.known(part), spec.size.video, spec.max_decode_bytes, listed)

    def take() -> None:
        part, reference = pending.popleft()
        results = _result(part, reference, begin)
        for path, found in zip(part, results, strict=False):
            if isinstance(found, Unchecked):
                unchecked.append(found)
                files[path] = found.file
            elif not isinstance(found, StoreFailure):
                files[path] = found
        scan_cache.add({path: files[path] for path in part if path in files})
        if failures := [found for found in results if isinstance(found, StoreFailure)]:
            scan_cache.save()
            raise failures[0]
        on_progress(len(part))

    for start in range(0, len(paths), FILES_PER_TASK):
        if len(pending) >= MAX_PENDING_TASKS:
            take()
        part = paths[start : start + FILES_PER_TASK]
        pending.append((part, begin(part)))
    while pending:
        take()
    scan_cache.save()
    if unchecked:
        logger.warning(
            "%d files are taken as they were at the last scan, since it cannot be asked now whether they have changed "
            "(the first: %s); run again to have them checked",
            *(len(unchecked), unchecked[0].reason),
        )
    return assign(rows, {name: files[path] for name, path in places.items()}, spec)


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


def _names(row: Mapping[str, Any], param: str, spec: SampleSpec) -> list[str]:
    """The files that a row names for a parameter, as it names them."""
    value = row[spec.columns[param]]
    return value if isinstance(value, list) else [value]


def _places(rows: Iterable[Mapping[str, Any]], spec: SampleSpec) -> dict[str, str]:
    """Each file's name in the rows -> its path or URL, found once (on a disk that may take several questions)."""
    names = dict.fromkeys(name for row in rows for param in spec.file_params for name in _names(row, param, spec))
    return {name: resolve_file(spec.base_path, name) for name in names}


def assign(
    rows: Iterable[Mapping[str, Any]], files: Mapping[str, Scanned], spec: SampleSpec
) -> tuple[list[Sample], list[Quarantined]]:
    """Give every row its bucket and key inputs, or its reason for quarantine. `files`: by the names in the rows.

    Warns of what is enlarged, cut or left aside.
    """
    samples: list[Sample] = []
    bad: list[Quarantined] = []
    fits = Fits()
    for row in rows:
        sample_id = row["sample_id"]
        found = {param: [files[name] for name in _names(row, param, spec)] for param in spec.file_params}
        # As the dataset writes it: the same data under another folder gives the same index.
        source = str(row[spec.columns[spec.file_params[0]]]) if spec.file_params else ""
        failure = next((item for items in found.values() for item in items if isinstance(item, Failure)), None)
        try:
            if failure is None:
                good = {
                    param: [item for item in items if isinstance(item, SourceFile)] for param, items in found.items()
                }
                bucket = bucket_of(good, spec)
                inputs = {param: row[column] for param, column in spec.columns.items() if param not in good}
                inputs |= {"height": bucket.height, "width": bucket.width, "num_frames": bucket.num_frames}
                inputs |= pixel_keys(row, good, bucket, spec)
                fits.add(sample_id, size_fits(good, bucket, spec))
                samples.append(Sample(sample_id, source, row, bucket, inputs, *decode_bytes(good, bucket, spec)))
        except UserError as error:
            failure = Failure.of(error)
        if failure is not None:
            bad.append(Quarantined(sample_id, source, failure.error, failure.message))
    fits.warn_all()
    return samples, bad
