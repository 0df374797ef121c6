"""The commit of a cache: index and quarantine in parts, then manifest.json, by which all of it exists at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from ray_diffsynth import storage
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.index import CAPTION, QUARANTINE_SCHEMA, bucket_ranges, check_places, index_schema
from ray_diffsynth.cache.manifest import IN_ONE_FILE, MANIFEST_FILE, Manifest
from ray_diffsynth.cache.names import INDEX_FOLDER, QUARANTINE_FOLDER, inside, is_table
from ray_diffsynth.cache.tables import write_parts


def _check(manifest: Manifest, index: pa.Table, quarantine: pa.Table) -> None:
    """Raise CacheError unless every sample is in the index or in quarantine, once; before anything is written."""
    counts = manifest.counts
    if counts["samples"] != index.num_rows or counts["quarantined"] != quarantine.num_rows:
        raise CacheError(
            f"the manifest counts {counts['samples']} samples and {counts['quarantined']} quarantined, "
            f"its tables have {index.num_rows} and {quarantine.num_rows}"
        )
    if counts["samples"] + counts["quarantined"] != counts["total"]:
        raise CacheError(
            f"{counts['samples']} samples and {counts['quarantined']} quarantined do not add up to {counts['total']}"
        )
    if len(pc.unique(index.column("sample_id"))) != index.num_rows:
        raise CacheError("a sample_id stands twice in the index")
    if index.num_rows and any(index.column(name).null_count for name in index.column_names if name != "source"):
        raise CacheError("the index has a row without a location in some group")
    ranges = {name: len(rows) for name, rows in bucket_ranges(index).items()}
    if list(ranges.items()) != list(manifest.buckets.items()):
        raise CacheError(f"the manifest has the buckets {manifest.buckets}, its index {ranges}")
    for group in manifest.groups:
        if group.empty_key is not None and group.empty_at is None:
            what = f"an empty caption {group.empty_key}"
            raise CacheError(f"the group {group.name} has {what} but no place of it (empty_at)")


def commit(
    cache: str,
    manifest: Manifest,
    index: pa.Table,
    quarantine: pa.Table,
    captions: Sequence[str | None] | pa.ChunkedArray | None = None,
    *,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Make a cache readable: write the parts of index and quarantine that are not there, then manifest.json.

    A crash before the last rename leaves the manifest that was there; files that the new one does not name are removed
    afterwards, those of an interrupted commit among them. The shards must be written. `captions`: one an index row.
    check: raises if another attempt has the cache (`Lease.check`); asked right before manifest.json gets its name, and
    before each removal. A manifest of an older version stays one. Returns the manifest with its parts filled in.

    Raises CacheError when counts, buckets and tables do not add up, UnsafeNameError for names that no cache has and for
    a folder that is a link out of it.
    """
    columns = index_schema(group.name for group in manifest.groups)
    index = index.select(columns.names).cast(columns)
    for name in set(QUARANTINE_SCHEMA.names) - set(quarantine.column_names):
        quarantine = quarantine.append_column(name, pa.nulls(quarantine.num_rows, pa.string()))
    quarantine = quarantine.select(QUARANTINE_SCHEMA.names).cast(QUARANTINE_SCHEMA)
    _check(manifest, index, quarantine)
    manifest.check_groups(cache)
    check_places(index, [group.name for group in manifest.groups], cache)
    if captions is None:
        captions = pa.nulls(index.num_rows, pa.string())
    elif not isinstance(captions, pa.ChunkedArray):
        captions = pa.array(captions, pa.string())
    there, whole = _files_in_place(cache), manifest.version in IN_ONE_FILE
    manifest = replace(
        manifest,
        index_parts=write_parts(cache, INDEX_FOLDER, index.append_column(CAPTION, captions), there, whole=whole),
        quarantine_parts=write_parts(cache, QUARANTINE_FOLDER, quarantine, there, whole=whole),
    )
    text = json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n"
    storage.write_bytes_atomic(storage.join(cache, MANIFEST_FILE), text.encode(), check=check)
    for path in old_tables(cache, manifest):
        check()
        storage.remove(path)
    return manifest


def _files_in_place(cache: str) -> Collection[str]:
    """Parts that need not be written again: those of the committed manifest, which whoever commits has read.

    What an interrupted commit left is written once more: nobody has compared its bytes with its name. Raises
    UnsafeNameError for a folder that is a link out of the cache.
    """
    found = {
        f"{folder}/{file}"
        for folder in (INDEX_FOLDER, QUARANTINE_FOLDER)
        for file in storage.file_sizes(inside(cache, folder))
    }
    try:
        return found.intersection(Manifest.load(cache).tables())
    except CacheError:
        return ()


def old_tables(cache: str, manifest: Manifest) -> Iterator[str]:
    """Index and quarantine files that the manifest does not name. Raises UnsafeNameError."""
    kept = set(manifest.tables())
    for folder in (INDEX_FOLDER, QUARANTINE_FOLDER):
        for file in storage.list_files(inside(cache, folder), suffix=".parquet"):
            if is_table(file) and f"{folder}/{file}" not in kept:
                yield inside(cache, folder, file)
