"""The end of stage 1: every sample is in the index or in quarantine, by one atomic write of the manifest."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.manifest import QUARANTINE_SCHEMA, GroupSpec, Manifest, commit
from ray_diffsynth.cache.store import shard_path
from ray_diffsynth.data.metadata import Quarantined
from ray_diffsynth.data.storage import file_size
from ray_diffsynth.errors import UserError
from ray_diffsynth.preprocess.catalog import GroupCatalog, Location
from ray_diffsynth.preprocess.keys import GroupPlan
from ray_diffsynth.preprocess.scan import Failure, Sample

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
    cache: str, manifest: Manifest | None, index: pa.Table | None, family: str, samples: Sequence[Sample]
) -> None:
    """Raise CacheError if `cache` holds another dataset's or family's cache, which a commit would replace."""
    if manifest is None or index is None:
        return
    if manifest.family != family:
        raise CacheError(
            f"{cache} already holds a cache of family {manifest.family}, and this model is {family}; "
            "choose another --output_path"
        )
    known = set(index["sample_id"].to_pylist())
    if known and samples and known.isdisjoint(sample.sample_id for sample in samples):
        raise CacheError(
            f"{cache} already holds the cache of another dataset ({len(known)} samples, such as {min(known)!r}, none "
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
    rows: dict[str, list[tuple[str, Location]]] = {group.name: [] for group in job.groups}
    bad = [{"sample_id": q.sample_id, "source": q.source, "error": q.error, "message": q.message} for q in rejected]
    for sample in samples:
        keys = {group.name: group.key(sample.inputs) for group in job.groups}
        failure = _first_failure(keys, catalogs)
        if failure is None:
            good.append(sample)
            for name, key in keys.items():
                rows[name].append((key, catalogs[name].locations[key]))
        else:
            name, reason = failure
            bad.append(
                {
                    "sample_id": sample.sample_id,
                    "source": sample.source,
                    "error": reason.error,
                    "message": reason.message,
                }
                | {"group": name, "key": keys[name]}
            )
    if len(good) + len(bad) != total:
        raise CacheError(f"{total} rows came in, {len(good)} are cached and {len(bad)} quarantined: a sample was lost")
    if not good:
        raise CacheError(_nothing_left(bad, total))
    _check_quarantine(job.config.max_quarantine, bad, total)
    index = {
        "sample_id": [s.sample_id for s in good],
        "source": [s.source for s in good],
        "bucket": [s.bucket.name for s in good],
    }
    columns: dict[str, pa.Array] = {name: pa.array(values, pa.string()) for name, values in index.items()}
    for name, located in rows.items():
        columns[f"{name}_key"] = pa.array([key for key, _ in located], pa.string())
        columns[f"{name}_file"] = pa.array([place.file for _, place in located], pa.string())
        columns[f"{name}_row_group"] = pa.array([place.row_group for _, place in located], pa.int32())
        columns[f"{name}_row"] = pa.array([place.row for _, place in located], pa.int32())
    draft = _manifest(job, good, len(bad), total, catalogs)
    caption = job.sample.columns.get("prompt")
    captions = [_text(sample.row.get(caption)) for sample in good] if caption is not None else None
    quarantine = pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA)
    manifest = commit(job.cache, draft, pa.table(columns), quarantine, captions)
    listed = tuple(Quarantined(item["sample_id"], item["source"], item["error"], item["message"]) for item in bad)
    return Outcome(manifest, listed)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _check_quarantine(most: float | None, bad: Sequence[Mapping[str, str]], total: int) -> None:
    """Raise QuarantineError if more samples are in quarantine than `max_quarantine` allows."""
    if most is None or len(bad) <= (most * total if most < 1 else most):
        return
    reasons = ", ".join(f"{count} x {error}" for error, count in Counter(item["error"] for item in bad).most_common())
    first = "; ".join(f"{item['sample_id']}: {item['message']}" for item in bad[:3])
    raise QuarantineError(
        f"{len(bad)} of {total} rows are for quarantine, --max_quarantine {most:g} allows fewer ({reasons}; {first}); "
        "the cache is not committed, but what is encoded stays: mend the data or raise the limit, and run again"
    )


def _first_failure(keys: Mapping[str, str], catalogs: Mapping[str, GroupCatalog]) -> tuple[str, Failure] | None:
    for name, key in keys.items():
        if key not in catalogs[name].locations:
            lost = Failure("EncoderDied", "the encoding process died each time it reached this sample")
            return name, catalogs[name].failures.get(key, lost)
    return None


def _nothing_left(bad: Sequence[Mapping[str, str]], total: int) -> str:
    if not total:
        return "the dataset has no rows; look at --dataset_metadata_path"
    name, error, message = (bad[0][key] for key in ("sample_id", "error", "message"))
    return f"none of {total} samples could be encoded; the first, {name}: {error}: {message}"


def _manifest(
    job: "Job", good: Sequence[Sample], bad: int, total: int, catalogs: Mapping[str, GroupCatalog]
) -> Manifest:
    buckets: dict[str, int] = {}
    for sample in good:
        buckets[sample.bucket.name] = buckets.get(sample.bucket.name, 0) + 1
    groups = tuple(_group_spec(job, group, good, catalogs[group.name]) for group in job.groups)
    texts = sum(spec.rows for spec, group in zip(groups, job.groups, strict=True) if group.caption_only)
    return Manifest(
        family=job.family,
        task=job.config.task,
        trainable=job.config.trained,
        parameters=job.stages.parameters,
        groups=groups,
        buckets=buckets,
        counts={"samples": len(good), "quarantined": bad, "total": total, "texts": texts},
        codec=job.config.cache_codec,
        dtype=job.config.dtype,
    )


def _group_spec(job: "Job", group: GroupPlan, good: Sequence[Sample], catalog: GroupCatalog) -> GroupSpec:
    keys = {group.key(sample.inputs) for sample in good}
    empty = group.key({"prompt": ""}) if group.caption_only else None
    if empty is not None and empty not in catalog.locations:
        reason = catalog.failures.get(empty, Failure("EncoderDied", "the encoding process died each time"))
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
    return sum(file_size(shard_path(cache, group, file)) for file in files)
