"""The scan: every source file's header and content hash, so that each row has bucket and keys before it is decoded.

A file whose size and modification time (or ETag) equal those of the last scan is not read again.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray

from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.data.metadata import Metadata, Quarantined
from ray_diffsynth.data.samples import SampleSpec, SourceFile, bucket_of, file_stamp, pixel_keys, scan_file
from ray_diffsynth.data.storage import exists, join, read_bytes, write_bytes_atomic
from ray_diffsynth.data.video import require_video_support
from ray_diffsynth.errors import UserError

MEMO = "index/sources.json"
FILES_PER_TASK = 64


@dataclass(frozen=True, slots=True)
class Sample:
    """A good row: its id, raw values, bucket, and its inputs as they enter a cache key (content hash for a file)."""

    sample_id: str
    source: str
    row: Mapping[str, Any]
    bucket: Bucket
    inputs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a file or row cannot be used: error class and message, as they go to quarantine."""

    error: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        return cls(type(error).__name__, str(error))


Scanned = SourceFile | Failure


def scan_files(paths: Sequence[str], memo: Mapping[str, SourceFile], animations: bool = False) -> list[Scanned]:
    """Scan each path; a file with the stamp of its memo is taken from there. Errors are values."""
    found: list[Scanned] = []
    for path in paths:
        try:
            known = memo.get(path)
            found.append(
                known
                if known is not None and known.stamp == file_stamp(path)
                else scan_file(path, animations=animations)
            )
        except UserError as error:
            found.append(Failure.of(error))
    return found


def load_memo(cache: str) -> dict[str, SourceFile]:
    """Sources of the last scan by path; empty when there is none (it only saves time, so a damaged one is ignored)."""
    path = join(cache, MEMO)
    if not exists(path):
        return {}
    try:
        return {item["path"]: SourceFile(**item) for item in json.loads(read_bytes(path))}
    except (ValueError, TypeError, KeyError):
        return {}


def save_memo(cache: str, files: Iterable[Scanned]) -> None:
    """Remember the scanned sources for the next run."""
    rows = [asdict(item) for item in files if isinstance(item, SourceFile)]
    write_bytes_atomic(join(cache, MEMO), json.dumps(rows).encode())


def scan_dataset(
    metadata: Metadata,
    spec: SampleSpec,
    cache: str,
    *,
    num_cpus: float,
    remember: bool = True,
    on_progress: Callable[[int], None] = lambda n: None,
) -> tuple[list[Sample], list[Quarantined]]:
    """Samples in dataset order, and the rows that cannot be used with their reason. Ray tasks read the files."""
    rows = metadata.table.to_pylist()
    paths = list(dict.fromkeys(path for row in rows for param in spec.file_params for path in spec.paths(row, param)))
    require_video_support(paths)
    memo = load_memo(cache)
    task = ray.remote(num_cpus=num_cpus)(scan_files)
    parts = [paths[start : start + FILES_PER_TASK] for start in range(0, len(paths), FILES_PER_TASK)]
    pending = [
        task.remote(part, {path: memo[path] for path in part if path in memo}, spec.size.video) for part in parts
    ]
    files: dict[str, Scanned] = {}
    for part, reference in zip(parts, pending, strict=True):
        files.update(zip(part, ray.get(reference), strict=True))
        on_progress(len(part))
    if remember:
        save_memo(cache, files.values())
    return assign(rows, files, spec)


def assign(
    rows: Iterable[Mapping[str, Any]], files: Mapping[str, Scanned], spec: SampleSpec
) -> tuple[list[Sample], list[Quarantined]]:
    """Give every row its bucket and key inputs, or its reason for quarantine."""
    samples: list[Sample] = []
    bad: list[Quarantined] = []
    for row in rows:
        sample_id = row["sample_id"]
        found = {param: [files[path] for path in spec.paths(row, param)] for param in spec.file_params}
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
                samples.append(Sample(sample_id, source, row, bucket, inputs))
        except UserError as error:
            failure = Failure.of(error)
        if failure is not None:
            bad.append(Quarantined(sample_id, source, failure.error, failure.message))
    return samples, bad
