"""What a cache holds, in numbers; and which rows of which files its index names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_diffsynth import storage
from ray_diffsynth.cache.errors import MissingFilesError
from ray_diffsynth.cache.manifest import GroupSpec, Manifest, committed
from ray_diffsynth.cache.names import inside
from ray_diffsynth.cache.store import list_shards

Place = tuple[int, int, str]
"""Row group, row in it, key."""


def named_rows(index: pa.Table, spec: GroupSpec) -> dict[str, list[Place]]:
    """File -> the distinct rows of it that the manifest names: those of the index, and the empty caption's."""
    columns = [f"{spec.name}_{name}" for name in ("file", "row_group", "row", "key")]
    rows = index.select(columns).group_by(columns).aggregate([])
    files: defaultdict[str, list[Place]] = defaultdict(list)
    for file, row_group, row, key in zip(*(rows[name].to_pylist() for name in columns), strict=True):
        files[file].append((row_group, row, key))
    if spec.empty_key is not None and spec.empty_at is not None:
        file, row_group, row = spec.empty_at
        if (row_group, row, spec.empty_key) not in files[file]:
            files[file].append((row_group, row, spec.empty_key))
    return {file: sorted(places) for file, places in sorted(files.items())}


def orphans(cache: str, spec: GroupSpec, named: Mapping[str, Any]) -> Iterator[str]:
    """Files of a group's folder that the manifest does not name: left by an interrupted run, or no longer needed."""
    return (file for file in list_shards(cache, spec.name) if file not in named)


def check_files(cache: str, manifest: Manifest, index: pa.Table) -> None:
    """Raise MissingFilesError, with counts and the first names, if files that the index names are not there.

    One listing of each group's folder; no file is opened.
    """
    for spec in manifest.groups:
        wanted = set(pc.unique(index.column(f"{spec.name}_file")).to_pylist())
        wanted |= {spec.empty_at[0]} if spec.empty_at is not None else set()
        if absent := sorted(wanted - storage.file_sizes(inside(cache, spec.name)).keys()):
            raise MissingFilesError(cache, spec.name, absent, len(wanted))


def inspect_cache(cache: str) -> dict[str, Any]:
    """The figures of a committed cache, for printing and for JSON. Raises CacheError."""
    cache = storage.absolute(cache)
    manifest, index = committed(cache)
    quarantine = manifest.read_quarantine(cache)
    groups = {}
    for spec in manifest.groups:
        named = named_rows(index, spec)
        groups[spec.name] = {
            "rows": spec.rows,
            "files": len(named),
            "bytes": spec.nbytes,
            "orphans": sum(1 for _ in orphans(cache, spec, named)),
            "fingerprint": spec.fingerprint,
            "depends_on": spec.parts,
        }
    reasons = quarantine.column("error").value_counts().to_pylist()
    return {
        "cache": cache,
        "family": manifest.family,
        "task": manifest.task,
        "trainable": list(manifest.trainable),
        "samples": index.num_rows,
        "duplicates": index.num_rows - int(pc.count_distinct(index.column("sample_id")).as_py()),
        "quarantined": quarantine.num_rows,
        "total": manifest.counts["total"],
        "texts": manifest.counts.get("texts", 0),
        "bytes": sum(spec.nbytes for spec in manifest.groups),
        "buckets": manifest.buckets,
        "parameters": {
            name: {"group": spec.name, "rows": spec.rows} for spec in manifest.groups for name in spec.parameters
        },
        "groups": groups,
        "reasons": {item["values"]: item["counts"] for item in reasons},
        "codec": manifest.codec,
        "dtype": manifest.dtype,
        "hash": manifest.hash(),
    }


def facts_as_text(facts: Mapping[str, Any]) -> str:
    """`inspect_cache` for people."""
    lines = [
        f"cache        {facts['cache']}",
        f"for          {facts['family']}, {facts['task']}, training {', '.join(facts['trainable'])}",
        f"samples      {facts['samples']} of {facts['total']} rows, {facts['quarantined']} in quarantine",
        f"texts        {facts['texts']} distinct",
        f"bytes        {facts['bytes']:,} ({facts['dtype']}, {facts['codec']})",
        *histogram(facts["buckets"]),
    ]
    for name, parameter in facts["parameters"].items():
        lines.append(f"parameter    {name}: {parameter['rows']} rows in {parameter['group']}/")
    for name, group in facts["groups"].items():
        spare = f", {group['orphans']} files that nothing points to" if group["orphans"] else ""
        lines.append(f"group        {name}: {group['files']} files, {group['bytes']:,} bytes{spare}")
        lines += [f"             {part}: {value}" for part, value in group["depends_on"].items()]
    lines += [f"quarantine   {count} x {reason}" for reason, count in facts["reasons"].items()]
    return "\n".join(lines)


def histogram(buckets: Mapping[str, int], width: int = 30) -> list[str]:
    """A line with a bar for each bucket (name -> samples)."""
    most = max(buckets.values(), default=1)
    name_width = max((len(name) for name in buckets), default=0)
    bars = ((name, count, "#" * max(1, round(width * count / most))) for name, count in buckets.items())
    return [f"bucket       {name:>{name_width}}  {count:>8}  {bar}" for name, count, bar in bars]
