"""The end of stage 1: every sample is in the index or in quarantine, by one atomic write of the manifest."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

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
from ray_diffsynth.preprocess.catalog import GroupCatalog
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.records import Failure, Sample, ScannedRows
from ray_diffsynth.storage import file_sizes, join


class QuarantineError(UserError):
    """More samples are in quarantine than allowed."""


@dataclass(frozen=True)
class Outcome:
    """What was committed, and who is in quarantine."""

    manifest: Manifest
    quarantine: tuple[Quarantined, ...]


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
    good: list[int] = []
    failing = [run for run in runs if run.catalog.has_failures()]
    total = rows.total
    bad = [_entry(item) for item in rows.rejected]
    for number, sample in enumerate(rows.samples):
        entry = _quarantined(number, sample, failing)
        if entry is not None:
            bad.append(entry)
            continue
        good.append(number)
        for run in runs:
            if run.keys[number] not in run.catalog.locations:
                raise CacheError(f"{sample.sample_id} was neither encoded nor did it fail in {run.name}; run again")
    if len(good) + len(bad) != total:
        raise CacheError(f"{total} rows came in, {len(good)} are cached and {len(bad)} quarantined: a sample was lost")
    if not good:
        raise CacheError(_nothing_left(bad, total))
    samples = [rows.samples[number] for number in good]
    index = {
        "sample_id": [sample.sample_id for sample in samples],
        "source": [sample.source for sample in samples],
        "bucket": [sample.bucket.name for sample in samples],
    }
    columns: dict[str, pa.Array] = {name: pa.array(values, pa.string()) for name, values in index.items()}
    keys = {run.name: [run.keys[number] for number in good] for run in runs}
    for run in runs:
        places = [run.catalog.locations[key] for key in keys[run.name]]
        columns[f"{run.name}_key"] = pa.array(keys[run.name], pa.string())
        columns[f"{run.name}_file"] = pa.array([place.file for place in places], pa.string())
        columns[f"{run.name}_row_group"] = pa.array([place.row_group for place in places], pa.int32())
        columns[f"{run.name}_row"] = pa.array([place.row for place in places], pa.int32())
    distinct = {name: set(of_group) for name, of_group in keys.items()}
    write_warnings(cache, {run.name: _row_warnings(distinct[run.name], run.catalog) for run in runs})
    groups = tuple(_group_spec(cache, run, distinct[run.name]) for run in runs)
    texts = sum(spec.rows for spec, run in zip(groups, runs, strict=True) if run.plan.caption_only)
    draft = replace(
        draft,
        groups=groups,
        buckets=dict(Counter(index["bucket"])),
        counts={"samples": len(good), "quarantined": len(bad), "total": total, "texts": texts},
    )
    captions = [_text(sample.row.get(caption)) for sample in samples] if caption is not None else None
    quarantine = pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA)
    manifest = commit(cache, draft, pa.table(columns), quarantine, captions, check=check)
    listed = tuple(Quarantined(item["sample_id"], item["source"], item["error"], item["message"]) for item in bad)
    return Outcome(manifest, listed)


def _row_warnings(keys: Collection[str], catalog: GroupCatalog) -> dict[str, RowWarnings]:
    return {key: pairs for key, pairs in catalog.warnings.items() if key in keys}


def add_row_warnings(warnings: DataWarnings, samples: Sequence[Sample], runs: Sequence[GroupRun]) -> None:
    """Add what is known of each sample's rows, encoded now or by an earlier run, and of this run's batches."""
    for run in runs:
        for kind, detail in sorted(run.catalog.run_warnings):
            warnings.add(kind, "", detail)
        if not run.catalog.warnings:
            continue
        for sample, key in zip(samples, run.keys, strict=True):
            for kind, detail in run.catalog.warnings.get(key, ()):
                warnings.add(kind, sample.sample_id, detail)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def check_quarantine(rows: ScannedRows, runs: Sequence[GroupRun], most: float | None) -> None:
    """Raise QuarantineError if more rows are for quarantine by now than `most` (`--max_quarantine`) allows.

    Exact repetitions, by which rows are given more weight, do not count.
    """
    if most is None:
        return
    total = rows.total
    limit = int(most * total if most < 1 else most)
    bad: list[Mapping[str, str]] = [_entry(item) for item in rows.rejected if item.error != DUPLICATE]
    if failing := [run for run in runs if run.catalog.has_failures()]:
        found = (_quarantined(number, sample, failing) for number, sample in enumerate(rows.samples))
        bad += [entry for entry in found if entry is not None]
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


def _quarantined(number: int, sample: Sample, runs: Sequence[GroupRun]) -> dict[str, str] | None:
    """The quarantine's entry of a sample that failed in one of the groups; None for a good one.

    Its `group` and `key`, by which the next run knows it, are left out where that run is to try it again.
    """
    for run in runs:
        if (reason := run.failure(number)) is not None:
            key = run.keys[number]
            entry = _entry(Quarantined(sample.sample_id, sample.source, reason.error, reason.message))
            return entry | ({"group": run.name, "key": key} if key in run.catalog.failures else {})
    return None


def _nothing_left(bad: Sequence[Mapping[str, str]], total: int) -> str:
    if not total:
        return "the dataset has no rows; look at --dataset_metadata_path"
    name, error, message = (bad[0][key] for key in ("sample_id", "error", "message"))
    return f"none of {total} samples could be encoded; the first, {name}: {error}: {message}"


def _group_spec(cache: str, run: GroupRun, keys: set[str]) -> GroupSpec:
    """`keys`: of the rows that the index names."""
    group, catalog, empty = run.plan, run.catalog, run.empty_key
    if empty is not None and empty not in catalog.locations:
        reason = catalog.failure(empty) or Failure("CacheError", "it was not encoded")
        raise CacheError(
            f"the empty caption, which stage 2 needs to drop captions, could not be encoded: {reason.error}: "
            f"{reason.message}; mend the encoder, then run again with --retry_quarantined"
        )
    return GroupSpec(
        name=group.name,
        parameters=group.parameters,
        fingerprint=group.fingerprint,
        parts=dict(group.parts),
        rows=len(keys),
        nbytes=_group_bytes(
            cache, group.name, {catalog.locations[key].file for key in {*keys, empty} if key is not None}
        ),
        empty_key=empty,
        empty_at=astuple(catalog.locations[empty]) if empty is not None else None,
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
