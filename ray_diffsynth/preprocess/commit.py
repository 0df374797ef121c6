"""The end of stage 1: every sample is in the index or in quarantine, by one atomic write of the manifest."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import pyarrow as pa

from ray_diffsynth.cache.commit import commit
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.index import QUARANTINE_SCHEMA
from ray_diffsynth.cache.manifest import MANIFEST_VERSION, SAME_KEYS, GroupSpec, Manifest
from ray_diffsynth.cache.names import shard_path
from ray_diffsynth.cache.row_warnings import RowWarnings, write_warnings
from ray_diffsynth.data.metadata import DUPLICATE, Quarantined
from ray_diffsynth.data.warnings import DataWarnings
from ray_diffsynth.errors import UserError
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.key_columns import Mask, Numbers, as_strings, is_among, packed, positions, unpacked
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.samples import Samples, ScannedRows
from ray_diffsynth.storage import file_sizes, join


class QuarantineError(UserError):
    """More samples are in quarantine than allowed."""


@dataclass(frozen=True)
class Outcome:
    """What was committed, and who is in quarantine. `good`: the numbers of the samples in the index."""

    manifest: Manifest
    quarantine: tuple[Quarantined, ...]
    good: Numbers


def check_family_and_version(cache: str, manifest: Manifest | None, family: str) -> None:
    """Raise CacheError if `cache` holds another family's or version's cache, which a commit would replace."""
    if manifest is None:
        return
    if manifest.family != family:
        raise CacheError(
            f"{cache} already holds a cache of family {manifest.family}, and this model is {family}; "
            "choose another --output_path"
        )
    if manifest.version not in SAME_KEYS:
        raise CacheError(
            f"{cache} is a cache of version {manifest.version}, whose keys stand on hashes of code; those of version "
            f"{MANIFEST_VERSION} stand on stated versions, so that no row of it would be found. Training still reads "
            "it; to encode, choose another --output_path"
        )


def commit_cache(
    cache: str,
    draft: Manifest,
    rows: ScannedRows,
    runs: Sequence[GroupRun],
    *,
    caption: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> Outcome:
    """Write index, quarantine and manifest.

    `draft`: the manifest without groups, buckets and counts. caption: the column that holds the captions. check: asked
    right before the commit, raises if another attempt has the cache.
    Raises CacheError when no sample is left, before anything is written.
    """
    total, samples = rows.total, rows.samples
    failed = _failed(runs, len(samples))
    bad = [*map(_entry, rows.rejected), *_quarantined(samples, runs, failed)]
    good = np.flatnonzero(~failed)
    places = {run.name: run.catalog.locations.find(run.keys[good]) for run in runs}
    for run in runs:
        if (lost := places[run.name] < 0).any():
            (sample,) = samples.reader().take(good[lost][:1])
            raise CacheError(f"{sample.sample_id} was neither encoded nor did it fail in {run.name}; run again")
    if len(good) + len(bad) != total:
        raise CacheError(f"{total} rows came in, {len(good)} are cached and {len(bad)} quarantined: a sample was lost")
    if not len(good):
        raise CacheError(_nothing_left(bad, total))
    columns, captions = _own_columns(samples, ~failed, caption)
    for run in runs:
        columns |= _place_columns(run, good, places[run.name])
    distinct = {name: np.unique(found) for name, found in places.items()}
    write_warnings(cache, {run.name: _row_warnings(run, distinct[run.name]) for run in runs})
    groups = tuple(_group_spec(cache, run, distinct[run.name]) for run in runs)
    texts = sum(spec.rows for spec, run in zip(groups, runs, strict=True) if run.plan.caption_only)
    draft = replace(
        draft,
        groups=groups,
        buckets=_counts(columns["bucket"]),
        counts={"samples": len(good), "quarantined": len(bad), "total": total, "texts": texts},
    )
    quarantine = pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA)
    manifest = commit(cache, draft, pa.table(columns), quarantine, captions, check=check)
    listed = tuple(Quarantined(item["sample_id"], item["source"], item["error"], item["message"]) for item in bad)
    return Outcome(manifest, listed, good)


def _own_columns(
    samples: Samples, good: Mask, caption: str | None
) -> tuple[dict[str, pa.Array], pa.ChunkedArray | None]:
    """Ids, sources and buckets of the good samples, and their captions, if there is a column of captions."""
    parts: dict[str, list[pa.Array]] = {name: [] for name in ("sample_id", "source", "bucket", "caption")}
    for part in samples.parts():
        kept = pa.array(good[part.start : part.start + len(part.batch)])
        parts["sample_id"].append(part.ids.filter(kept))
        parts["source"].append(part.sources.filter(kept))
        parts["bucket"].append(pa.repeat(part.bucket.name, kept.true_count))
        if caption is not None:
            parts["caption"].append(part.batch.column(caption).filter(kept))
    columns = {name: pa.concat_arrays(arrays) for name, arrays in parts.items() if arrays}
    captions = columns.pop("caption", None)
    return columns, None if captions is None else pa.chunked_array([captions])


def _place_columns(run: GroupRun, good: Numbers, found: Numbers) -> dict[str, pa.Array]:
    """Keys of the good samples' rows of a group, and where they lie."""
    locations = run.catalog.locations
    files, row_groups, rows = (np.ascontiguousarray(column) for column in locations.places[found].T)
    return {
        f"{run.name}_key": as_strings(run.keys[good]),
        f"{run.name}_file": pa.array(locations.files, pa.string()).take(pa.array(files)),
        f"{run.name}_row_group": pa.array(row_groups, pa.int32()),
        f"{run.name}_row": pa.array(rows, pa.int32()),
    }


def _counts(column: pa.Array) -> dict[str, int]:
    """How often each value occurs, in order of appearance."""
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}


def _row_warnings(run: GroupRun, rows: Numbers) -> dict[str, RowWarnings]:
    """Of these rows of the catalog, by key."""
    warnings = run.catalog.warnings
    named = positions(packed(warnings), run.catalog.locations.keys[rows]) >= 0
    return {key: pairs for (key, pairs), kept in zip(warnings.items(), named.tolist(), strict=True) if kept}


def add_row_warnings(warnings: DataWarnings, samples: Samples, runs: Sequence[GroupRun]) -> None:
    """Add what is known of each sample's rows, encoded now or by an earlier run, and of this run's batches."""
    for run in runs:
        for kind, detail in sorted(run.catalog.run_warnings):
            warnings.add(kind, "", detail)
        if not run.catalog.warnings:
            continue
        warned = np.flatnonzero(is_among(run.keys, run.catalog.warnings))
        for sample, key in zip(samples.reader().take(warned), unpacked(run.keys[warned]), strict=True):
            for kind, detail in run.catalog.warnings[key]:
                warnings.add(kind, sample.sample_id, detail)


def check_quarantine(rows: ScannedRows, runs: Sequence[GroupRun], most: float | None) -> None:
    """Raise QuarantineError if more rows are for quarantine by now than `most` (`--max_quarantine`) allows.

    Exact repetitions, by which rows are given more weight, do not count.
    """
    if most is None:
        return
    total = rows.total
    limit = int(most * total if most < 1 else most)
    bad: list[Mapping[str, str]] = [_entry(item) for item in rows.rejected if item.error != DUPLICATE]
    bad += _quarantined(rows.samples, runs, _failed(runs, len(rows.samples)))
    if len(bad) <= limit:
        return
    reasons = ", ".join(f"{count} x {error}" for error, count in Counter(item["error"] for item in bad).most_common())
    first = "; ".join(f"{item['sample_id']}: {item['message']}" for item in bad[:3])
    raise QuarantineError(
        f"{len(bad)} of {total} rows are for quarantine, --max_quarantine {most:g} allows at most {limit} ({reasons}; "
        f"{first}); nothing is committed, but what is encoded stays: mend the data or raise the limit, then run again"
    )


def _entry(item: Quarantined) -> dict[str, str]:
    return {"sample_id": item.sample_id, "source": item.source, "error": item.error, "message": item.message}


def _failed(runs: Sequence[GroupRun], samples: int) -> Mask:
    """Which samples failed in one of the groups."""
    failed = np.zeros(samples, bool)
    for run in runs:
        failed |= run.failed()
    return failed


def _quarantined(samples: Samples, runs: Sequence[GroupRun], failed: Mask) -> Iterator[dict[str, str]]:
    """The quarantine's entries of the samples that failed, by the first group that they failed in.

    Its `group` and `key`, by which the next run knows it, are left out where that run is to try it again.
    """
    numbers = np.flatnonzero(failed)
    for number, sample in zip(numbers.tolist(), samples.reader().take(numbers), strict=True):
        for run in runs:
            key = run.key(number)
            if (reason := run.catalog.failure(key)) is not None:
                entry = _entry(Quarantined(sample.sample_id, sample.source, reason.error, reason.message))
                yield entry | ({"group": run.name, "key": key} if key in run.catalog.failures else {})
                break


def _nothing_left(bad: Sequence[Mapping[str, str]], total: int) -> str:
    if not total:
        return "the dataset has no rows; look at --dataset_metadata_path"
    name, error, message = (bad[0][key] for key in ("sample_id", "error", "message"))
    return f"none of {total} samples could be encoded; the first, {name}: {error}: {message}"


def _group_spec(cache: str, run: GroupRun, rows: Numbers) -> GroupSpec:
    """`rows`: those of the catalog that the index names."""
    group, catalog, empty = run.plan, run.catalog, run.empty_key
    if empty is not None and empty not in catalog.locations:
        reason = catalog.failure(empty) or Failure("CacheError", "it was not encoded")
        raise CacheError(
            f"the empty caption, which stage 2 needs to drop captions, could not be encoded: {reason.error}: "
            f"{reason.message}; mend the encoder, then run again with --retry_quarantined"
        )
    locations = catalog.locations
    files = {locations.files[number] for number in np.unique(locations.places[rows, 0]).tolist()}
    if empty is not None:
        files.add(locations[empty].file)
    return GroupSpec(
        name=group.name,
        parameters=group.parameters,
        fingerprint=group.fingerprint,
        parts=dict(group.parts),
        rows=len(rows),
        nbytes=_group_bytes(cache, group.name, files),
        empty_key=empty,
        empty_at=astuple(locations[empty]) if empty is not None else None,
    )


def _group_bytes(cache: str, group: str, files: set[str]) -> int:
    """Bytes of the files that the index names."""
    sizes = file_sizes(join(cache, group))
    if gone := sorted(files - sizes.keys()):
        raise CacheError(
            f"{shard_path(cache, group, gone[0])} was removed while this run was at work ({len(gone)} such files); "
            "nothing is committed: run again, which encodes only what they held"
        )
    return sum(sizes[file] for file in files)
