"""The commit: all or nothing, counts that add up, errors that name the remedy."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from ray_diffsynth import storage
from ray_diffsynth.cache.commit import commit
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.index import QUARANTINE_SCHEMA, bucket_ranges
from ray_diffsynth.cache.manifest import MANIFEST_FILE, Manifest
from tests.shard_names import shard_file


def test_load_gives_back_what_was_committed(tmp_path: Path, make_cache: Callable[..., Manifest]) -> None:
    committed = make_cache(str(tmp_path))
    loaded = Manifest.load(str(tmp_path))
    assert loaded == committed and loaded.hash() == committed.hash()
    assert list(loaded.buckets) == ["32x64", "64x64"]
    assert loaded.group("text_encoder").empty_at == (shard_file("texts"), 0, 0)
    with pytest.raises(CacheError, match="no group 'dit'; its groups are vae, text_encoder"):
        loaded.group("dit")
    index = loaded.read_index(str(tmp_path))
    assert index["sample_id"].to_pylist() == [f"s{i}" for i in range(12)]
    assert bucket_ranges(index) == {"32x64": range(0, 5), "64x64": range(5, 12)}
    quarantine = loaded.read_quarantine(str(tmp_path)).to_pylist()
    assert quarantine[0]["sample_id"] == "bad.png" and quarantine[0]["group"] is None


def test_the_same_cache_has_the_same_files_and_hash(tmp_path: Path, make_cache: Callable[..., Manifest]) -> None:
    one, two = make_cache(str(tmp_path / "a")), make_cache(str(tmp_path / "b"))
    assert one.hash() == two.hash()
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert dataclasses.replace(one, dtype="float32").hash() != one.hash()


def recommit(cache: str, manifest: Manifest, keep: int) -> Manifest:
    index = manifest.read_index(cache).slice(0, keep)
    buckets = {name: len(rows) for name, rows in bucket_ranges(index).items()}
    counts = {**manifest.counts, "samples": keep, "total": keep + 1}
    return commit(
        cache, dataclasses.replace(manifest, counts=counts, buckets=buckets), index, manifest.read_quarantine(cache)
    )


def test_a_second_commit_replaces_the_first(tmp_path: Path, make_cache: Callable[..., Manifest]) -> None:
    cache = str(tmp_path)
    first = make_cache(cache)
    second = recommit(cache, first, 7)
    assert Manifest.load(cache) == second and second.read_index(cache).num_rows == 7
    assert storage.list_files(str(tmp_path / "index")) == [part.file.split("/")[1] for part in second.index_parts]
    assert recommit(cache, second, 7) == second and second.read_index(cache).num_rows == 7


def test_counts_must_add_up(tmp_path: Path, make_cache: Callable[..., Manifest]) -> None:
    cache = str(tmp_path / "c")
    manifest = make_cache(cache)
    index, quarantine = manifest.read_index(cache), manifest.read_quarantine(cache)

    def refused(message: str, table: pa.Table = index, **changes: Any) -> None:
        with pytest.raises(CacheError, match=message):
            commit(str(tmp_path / "new"), dataclasses.replace(manifest, **changes), table, quarantine)

    refused("counts 11 samples", counts={"samples": 11, "quarantined": 1, "total": 12})
    refused("do not add up to 14", counts={"samples": 12, "quarantined": 1, "total": 14})
    refused("has the buckets", buckets={"64x64": 7, "32x64": 5})
    refused("not together", pa.concat_tables([index.slice(1), index.slice(0, 1)]))
    ids = pa.array(["s0"] * 12)
    refused("twice in the index", index.set_column(0, "sample_id", ids))
    holes = pa.array([None] * 12, pa.string())
    refused("without a location", index.set_column(index.column_names.index("vae_file"), "vae_file", holes))
    nowhere = tuple(dataclasses.replace(g, empty_key="t9", empty_at=None) for g in manifest.groups)
    refused("empty caption t9", groups=nowhere)
    assert not (tmp_path / "new").exists()
    short = pa.table({name: pa.array(["x"]) for name in QUARANTINE_SCHEMA.names[:4]})
    assert commit(cache, manifest, index, short).read_quarantine(cache)["key"].to_pylist() == [None]


def test_absent_caches(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"nowhere is not there; run jobs/preprocess.py"):
        Manifest.load(str(tmp_path / "nowhere"))
    with pytest.raises(CacheError, match="no committed cache"):
        Manifest.load(str(tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="no committed cache"):
        Manifest.load(str(tmp_path / "file"))


def test_damaged_manifests(cache: str) -> None:
    path = Path(cache) / MANIFEST_FILE
    text = path.read_text()
    content = json.loads(text)
    for size in range(0, len(text) - 2, 37):
        path.write_text(text[:size])
        with pytest.raises(CacheError, match="is damaged .* repair"):
            Manifest.load(cache)
    for name in content:
        path.write_text(json.dumps({key: value for key, value in content.items() if key != name}))
        if name in (
            "family",
            "task",
            "trainable",
            "parameters",
            "groups",
            "buckets",
            "counts",
            "codec",
            "dtype",
            "version",
        ):
            with pytest.raises(CacheError, match="is damaged"):
                Manifest.load(cache)
    for wrong in (
        "[]",
        "null",
        "1",
        '{"version": "1"}',
        json.dumps({**content, "surprise": 1}),
        json.dumps({**content, "groups": [1]}),
    ):
        path.write_text(wrong)
        with pytest.raises(CacheError, match="is damaged"):
            Manifest.load(cache)
    path.write_text(json.dumps({**content, "version": 99, "new": 1}))
    with pytest.raises(CacheError, match="newer ray_diffsynth"):
        Manifest.load(cache)


def test_damaged_tables(cache: str) -> None:
    manifest = Manifest.load(cache)
    for file, read in (
        (manifest.index_parts[0].file, manifest.read_index),
        (manifest.quarantine_parts[0].file, manifest.read_quarantine),
    ):
        path = Path(cache) / file
        whole = path.read_bytes()
        for content in (b"", whole[: len(whole) // 2], whole[:200] + b"\x00" + whole[201:]):
            path.write_bytes(content)
            with pytest.raises(CacheError, match="repair"):
                read(cache)
        os.remove(path)
        with pytest.raises(CacheError, match="repair"):
            read(cache)


def test_on_an_object_store(make_cache: Callable[..., Manifest]) -> None:
    fsspec.filesystem("memory").store.clear()
    committed = make_cache("memory://bucket/cache")
    assert Manifest.load("memory://bucket/cache") == committed
    assert committed.read_index("memory://bucket/cache").num_rows == 12
    with pytest.raises(CacheError, match="is not there"):
        Manifest.load("memory://bucket/other")
