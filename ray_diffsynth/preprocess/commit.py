"""The end of stage 1: every sample is in the index or in quarantine, by one atomic write of the manifest."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.manifest import QUARANTINE_SCHEMA, GroupSpec, Manifest, commit
from ray_diffsynth.cache.names import shard_path
from ray_diffsynth.cache.row_warnings import RowWarnings, write_warnings
from ray_diffsynth.data.metadata import DUPLICATE, Quarantined
from ray_diffsynth.data.warnings import DataWarnings
from ray_diffsynth.errors import UserError
from ray_diffsynth.preprocess.cache_keys import GroupPlan
from ray_diffsynth.preprocess.catalog import GroupCatalog
from ray_diffsynth.preprocess.records import Failure, Sample
from ray_diffsynth.storage import file_sizes, join

if TYPE_CHECKING:
    from ray_diffsynth.preprocess.job import Job


class QuarantineError(UserError):
    """More samples are in quarantine than allowed."""


@dataclass(frozen=True)
class Outcome:
    """What was committed, and who is in quarantine."""

    manifest: Manifest
    quarantine: tuple[Quarantined, ...]


def check_same_dataset(
    cache: str, manifest: Manifest | None, index: pa.Table | None, family: str, sample_ids: pa.ChunkedArray
) -> None:
    """Raise CacheError if `cache` holds another dataset's or family's cache, which a commit would replace.

    `sample_ids`: of the metadata's rows, so that it is known before anything is read or written.
    """
    if manifest is None or index is None:
        return
    if manifest.family != family:
        raise CacheError(
            f"{cache} already holds a cache of family {manifest.family}, and this model is {family}; "
            "choose another --output_path"
        )
    known = index["sample_id"]
    if len(known) and len(sample_ids) and not pc.any(pc.is_in(sample_ids, known.combine_chunks())).as_py():
        raise CacheError(
            f"{cache} already holds the cache of another dataset ({len(known)} samples, such as {known[0]}, none "
            "of which is in this one); choose another --output_path, or delete that folder if it is not needed"
        )


def commit_cache(
    job: "Job",
    samples: Sequence[Sample],
    rejected: Sequence[Quarantined],
    total: int,
    catalogs: Mapping[str, GroupCatalog],
) -> Outcome:
    """Write index, quarantine and manifest; the samples come in the order of training (by bucket).

    Raises CacheError when no sample is left, before anything is written.
    """
    good: list[Sample] = []
    groups = [(group, catalogs[group.name]) for group in job.groups]
    failing = _failing(job, catalogs)
    keys: dict[str, list[str]] = {group.name: [] for group in job.groups}
    bad = [{"sample_id": q.sample_id, "source": q.source, "error": q.error, "message": q.message} for q in rejected]
    for sample in samples:
        entry = _quarantined(sample, failing)
        if entry is not None:
            bad.append(entry)
            continue
        good.append(sample)
        for group, catalog in groups:
            key = group.key(sample.inputs)
            if key not in catalog.locations:
                raise CacheError(f"{sample.sample_id} was neither encoded nor did it fail in {group.name}; run again")
            keys[group.name].append(key)
    if len(good) + len(bad) != total:
        raise CacheError(f"{total} rows came in, {len(good)} are cached and {len(bad)} quarantined: a sample was lost")
    if not good:
        raise CacheError(_nothing_left(bad, total))
    index = {
        "sample_id": [s.sample_id for s in good],
        "source": [s.source for s in good],
        "bucket": [s.bucket.name for s in good],
    }
    columns: dict[str, pa.Array] = {name: pa.array(values, pa.string()) for name, values in index.items()}
    for name, of_group in keys.items():
        places = [catalogs[name].locations[key] for key in of_group]
        columns[f"{name}_key"] = pa.array(of_group, pa.string())
        columns[f"{name}_file"] = pa.array([place.file for place in places], pa.string())
        columns[f"{name}_row_group"] = pa.array([place.row_group for place in places], pa.int32())
        columns[f"{name}_row"] = pa.array([place.row for place in places], pa.int32())
    write_warnings(job.cache, {name: _row_warnings(set(keys[name]), catalogs[name]) for name in keys})
    draft = _manifest(job, keys, Counter(index["bucket"]), len(bad), total, catalogs)
    caption = job.sample.columns.get("prompt")
    captions = [_text(sample.row.get(caption)) for sample in good] if caption is not None else None
    quarantine = pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA)
    manifest = commit(job.cache, draft, pa.table(columns), quarantine, captions)
    listed = tuple(Quarantined(item["sample_id"], item["source"], item["error"], item["message"]) for item in bad)
    return Outcome(manifest, listed)


def _row_warnings(keys: Collection[str], catalog: GroupCatalog) -> dict[str, RowWarnings]:
    return {key: pairs for key, pairs in catalog.warnings.items() if key in keys}


def add_row_warnings(
    warnings: DataWarnings, job: "Job", samples: Sequence[Sample], catalogs: Mapping[str, GroupCatalog]
) -> None:
    """Add what is known of each sample's rows, encoded now or by an earlier run, and of this run's batches."""
    for group in job.groups:
        catalog = catalogs[group.name]
        for kind, detail in sorted(catalog.run_warnings):
            warnings.add(kind, "", detail)
        for sample in samples if catalog.warnings else ():
            for kind, detail in catalog.warnings.get(group.key(sample.inputs), ()):
                warnings.add(kind, sample.sample_id, detail)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def check_quarantine(
    job: "Job",
    samples: Sequence[Sample],
    rejected: Sequence[Quarantined],
    total: int,
    catalogs: Mapping[str, GroupCatalog],
) -> None:
    """Raise QuarantineError if more rows are for quarantine by now than `max_quarantine` allows.

    `catalogs`: of the groups that are done. Exact repetitions, by which rows are given more weight, do not count.
    """
    most = job.config.max_quarantine
    if most is None:
        return
    limit = int(most * total if most < 1 else most)
    bad: list[Mapping[str, str]] = [
        {"sample_id": entry.sample_id, "error": entry.error, "message": entry.message}
        for entry in rejected
        if entry.error != DUPLICATE
    ]
    if failing := _failing(job, catalogs):
        bad += [entry for sample in samples if (entry := _quarantined(sample, failing)) is not None]
    if len(bad) <= limit:
        return
    reasons = ", ".join(f"{count} x {error}" for error, count in Counter(item["error"] for item in bad).most_common())
    first = "; ".join(f"{item['sample_id']}: {item['message']}" for item in bad[:3])
    raise QuarantineError(
        f"{len(bad)} of {total} rows are for quarantine, --max_quarantine {most:g} allows at most {limit} ({reasons}; "
        f"{first}); nothing is committed, but what is encoded stays: mend the data or raise the limit, then run again"
    )


def _failing(job: "Job", catalogs: Mapping[str, GroupCatalog]) -> list[tuple[GroupPlan, GroupCatalog]]:
    """The groups in which a sample failed, in the order in which they are done."""
    found = [(group, catalogs[group.name]) for group in job.groups if group.name in catalogs]
    return [(group, catalog) for group, catalog in found if catalog.failures or catalog.transient]


def _quarantined(sample: Sample, groups: Sequence[tuple[GroupPlan, GroupCatalog]]) -> dict[str, str] | None:
    """The quarantine's entry of a sample that failed in one of the groups; None for a good one.

    Its `group` and `key`, by which the next run knows it, are left out where that run is to try it again.
    """
    for group, catalog in groups:
        key = group.key(sample.inputs)
        if (reason := catalog.failure(key)) is not None:
            entry = {"sample_id": sample.sample_id, "source": sample.source}
            entry |= {"error": reason.error, "message": reason.message}
            return entry | ({"group": group.name, "key": key} if key in catalog.failures else {})
    return None


def _nothing_left(bad: Sequence[Mapping[str, str]], total: int) -> str:
    if not total:
        return "the dataset has no rows; look at --dataset_metadata_path"
    name, error, message = (bad[0][key] for key in ("sample_id", "error", "message"))
    return f"none of {total} samples could be encoded; the first, {name}: {error}: {message}"


def _manifest(
    job: "Job",
    keys: Mapping[str, Sequence[str]],
    buckets: Mapping[str, int],
    bad: int,
    total: int,
    catalogs: Mapping[str, GroupCatalog],
) -> Manifest:
    groups = tuple(_group_spec(job, group, set(keys[group.name]), catalogs[group.name]) for group in job.groups)
    texts = sum(spec.rows for spec, group in zip(groups, job.groups, strict=True) if group.caption_only)
    return Manifest(
        family=job.family,
        task=job.config.task,
        trainable=job.config.trained,
        parameters=job.stages.parameters,
        groups=groups,
        buckets=dict(buckets),
        counts={"samples": sum(buckets.values()), "quarantined": bad, "total": total, "texts": texts},
        codec=job.config.cache_codec,
        dtype=job.config.dtype,
    )


def _group_spec(job: "Job", group: GroupPlan, keys: set[str], catalog: GroupCatalog) -> GroupSpec:
    empty = group.key({"prompt": ""}) if group.caption_only else None
    if empty is not None and empty not in catalog.locations:
        reason = catalog.failure(empty) or Failure("CacheError", "it was not encoded")
        raise CacheError(
            f"the empty caption, which stage 2 needs to drop captions, could not be encoded: {reason.error}: "
            f"{reason.message}; mend the encoder, then run again with --retry_quarantined"
        )
    return GroupSpec(
        name=group.name,
        parameters=group.group.parameters,
        fingerprint=group.fingerprint,
        parts=dict(group.parts),
        rows=len(keys),
        nbytes=_group_bytes(
            job.cache, group.name, {catalog.locations[key].file for key in {*keys, empty} if key is not None}
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
