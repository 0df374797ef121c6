"""`--dry_run`: what a run would do, from headers, hashes and the cache's manifest alone; nothing is written."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_diffsynth.cache.inspection import histogram
from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.data.warnings import DataWarnings
from ray_diffsynth.models.fingerprint import SKETCH
from ray_diffsynth.plan.cache_keys import GroupPlan
from ray_diffsynth.preprocess.commit import add_row_warnings
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.key_columns import hashed, is_among, positions
from ray_diffsynth.preprocess.pending import Committed, plan_pending
from ray_diffsynth.preprocess.samples import Samples, ScannedRows
from ray_diffsynth.preprocess.shard_plans import ShardPlans
from ray_diffsynth.preprocess.shards import EMPTY_CAPTION

_LATENT_BYTES_PER_PIXEL = 0.5 * 0.7
"""16-bit latents of an 8x VAE with 16 channels, times what planes-zstd makes of them."""
_TEXT_ROW_BYTES = 200_000
"""A caption of some 40 tokens of a 3584-wide encoder, times the same."""


def dry_run(
    committed: Committed, rows: ScannedRows, runs: Sequence[GroupRun], warnings: DataWarnings, *, retry: bool
) -> dict[str, Any]:
    """Print the plan; returns its figures: samples, quarantined, buckets, warnings, per group rows, reasons and bytes.

    `warnings`: of metadata and headers, to which those of rows in the cache are added; those that encoding other
    rows would give are not known. retry: rows that failed in an earlier run are tried again.
    """
    samples, rejected, total = rows.samples, rows.rejected, rows.total
    buckets = samples.names_of_buckets
    for run in runs:
        plan_pending(run, committed, samples, retry=retry)
    groups = {run.name: _group_figures(committed, run) for run in runs}
    add_row_warnings(warnings, samples, runs)
    plan: dict[str, Any] = {
        "samples": len(samples),
        "quarantined": len(rejected),
        "total": total,
        "removed": _removed(committed.index, samples),
        "buckets": buckets,
        "groups": groups,
        "warnings": warnings.to_json(),
    }
    print(
        f"{total} rows: {len(samples)} samples, {len(rejected)} for quarantine; "
        f"{plan['removed']} samples leave the cache"
    )
    print("\n".join(histogram(buckets)))
    for item in rejected[:10]:
        print(f"quarantine   {item.sample_id}: {item.error}: {item.message}")
    for line in warnings.lines():
        print(f"warning      {line}")
    for name, group in groups.items():
        print(
            f"group        {name}: {group['reused']} rows reused, {group['encode']} to encode, "
            f"about {group['bytes']:,} bytes"
        )
        for reason, count in group["reasons"].items():
            print(f"             {count} to encode: {reason}")
        if group["known_failures"]:
            print(f"             {group['known_failures']} failed before; --retry_quarantined tries them again")
    print("dry run: nothing was written")
    return plan


def _removed(index: pa.Table | None, samples: Samples) -> int:
    """How many samples of the cache are none of the dataset any more."""
    if index is None:
        return 0
    before = np.sort(hashed(index["sample_id"].to_pylist()))
    kept = np.zeros(len(before), bool)
    for part in samples.parts():
        found = positions(hashed(part.ids.to_pylist()), before)
        kept[found[found >= 0]] = True
    return int((~kept).sum())


def _group_figures(committed: Committed, run: GroupRun) -> dict[str, Any]:
    group, shards, catalog = run.plan, run.shards, run.catalog
    assert isinstance(shards, ShardPlans)  # as they were planned
    keys = np.unique(run.keys)
    stored = catalog.locations.find(keys) >= 0
    spec = None
    if committed.manifest is not None:
        spec = next((item for item in committed.manifest.groups if item.name == group.name), None)
    reasons: Counter[str] = Counter()
    if spec is not None and spec.fingerprint != group.fingerprint:
        reasons[changes(spec.parts, group.parts)] = run.rows
    else:
        known: dict[str, str] = {}
        if committed.index is not None and spec is not None:
            columns = (committed.index[name].to_pylist() for name in ("sample_id", f"{group.name}_key"))
            known = dict(zip(*columns, strict=True))
            known |= {} if spec.empty_key is None else {EMPTY_CAPTION: spec.empty_key}
        for row in (row for shard in shards for row in shard.rows):
            if known.get(row.sample_id) == row.key:
                reasons["a row that the cache has lost"] += 1
            elif row.sample_id in known:
                reasons[f"another {' or '.join(group.inputs)} than in the cache"] += 1
            else:
                reasons[
                    "the empty caption" if row.sample_id == EMPTY_CAPTION else "a sample that the cache does not have"
                ] += 1
    mean = spec.nbytes / spec.rows if spec is not None and spec.rows else None
    return {
        "encode": run.rows,
        "reused": int(stored.sum()),
        "known_failures": int((is_among(keys, catalog.failures) & ~stored).sum()),
        "reasons": dict(reasons),
        "bytes": _bytes(group, shards, mean),
    }


def _bytes(group: GroupPlan, shards: ShardPlans, mean: float | None) -> int:
    """About how much will be written: as the rows that are there, else by the size of the images."""
    if mean is not None:
        return round(mean * shards.rows)
    if not group.bucketed:
        return _TEXT_ROW_BYTES * shards.rows
    areas = np.array([Bucket.parse(bucket).area for bucket in shards.buckets], dtype=np.int64)
    return round(_LATENT_BYTES_PER_PIXEL * int((areas * np.diff(shards.ends, prepend=0)).sum()))


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two readable fingerprints: `weights:vae 1f2e… -> 9c0d…`."""
    names = [name for name in {**before, **now} if not name.startswith(SKETCH) and before.get(name) != now.get(name)]
    return (
        "; ".join(f"{name} {_short(before.get(name))} -> {_short(now.get(name))}" for name in names) or "the same parts"
    )


def _short(value: str | None) -> str:
    if value is None:
        return "absent"
    text = value if len(value) <= 24 else f"{value[:8]}…{value[-8:]}"
    return text if text.isprintable() else json.dumps(text)
