"""What `repair` must never remove: files of other programs and versions, and what it could not read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ray_diffsynth import storage
from ray_diffsynth.cache import lease as lease_module
from ray_diffsynth.cache import repair as repair_module
from ray_diffsynth.cache import store
from ray_diffsynth.cache.commit import commit
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.inspection import inspect_cache, named_rows
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.cache.repair import repair_cache
from ray_diffsynth.cache.store import GroupRow, write_shard
from ray_diffsynth.cache.tables import Part
from ray_diffsynth.cache.verify import verify_cache
from tests.shard_names import shard_file, stem


def snapshot(folder: str | Path) -> dict[str, str]:
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("prune", [False, True])
def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path, prune: bool) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "data" / "train-00000-of-00001.parquet")
    before = snapshot(tmp_path)
    with pytest.raises(CacheError, match="is not a cache"):
        repair_cache(str(tmp_path), prune=prune)
    assert snapshot(tmp_path) == before


def test_an_unfinished_run_is_a_cache(tmp_path: Path) -> None:
    shard = write_shard(str(tmp_path), "vae", stem("n"), "all", [GroupRow("k", {"x": torch.zeros(1)})], codec="none")
    assert not repair_cache(str(tmp_path)).committed
    assert (tmp_path / "vae" / shard.file).exists()


@pytest.mark.parametrize("prune", [False, True])
def test_files_of_other_programs_and_versions_stay(cache: str, monkeypatch: pytest.MonkeyPatch, prune: bool) -> None:
    for folder in ("vae", "index", "mine"):
        Path(cache, folder).mkdir(exist_ok=True)
        pq.write_table(pa.table({"a": [1]}), Path(cache, folder, "table.parquet"))
    Path(cache, "mine", "broken.parquet").write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        patch.setattr(store, "SHARD_VERSION", 99)
        write_shard(cache, "vae", "0" * 24, "64x64", [GroupRow("v99", {"input_latents": torch.zeros(1)})], codec="none")
    before = snapshot(cache)
    done = repair_cache(cache, prune=prune)
    assert done.committed and done.removed == [] and snapshot(cache) == before


def test_a_damaged_file_of_ours_that_nothing_names_is_removed(cache: str) -> None:
    path = Path(cache, "vae", "0" * 24 + ".parquet")
    path.write_bytes(b"PAR1 cut")
    done = repair_cache(cache)
    assert done.committed and [removed for removed, _ in done.removed] == [str(path)] and not path.exists()


def unreadable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    read = storage.read_bytes

    def refuse(path: str) -> bytes:
        if path.endswith(name):
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(storage, "read_bytes", refuse)


@pytest.mark.parametrize(
    "name", [shard_file("32x64-3"), shard_file("texts"), "manifest.json", "index", shard_file("spare")]
)
def test_what_cannot_be_read_stops_it_before_anything_is_removed(
    cache: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_shard(
        cache, "vae", stem("spare"), "64x64", [GroupRow("v99", {"input_latents": torch.zeros(1)})], codec="none"
    )
    Path(cache, "vae", shard_file("32x64-0")).write_bytes(b"damaged")
    Path(cache, "vae", ".x.parquet.tmp-1-ab").write_bytes(b"half")
    name = Manifest.load(cache).index_parts[0].file if name == "index" else name
    before = snapshot(cache)
    with monkeypatch.context() as patch:
        unreadable(patch, name)
        with pytest.raises(CacheError, match=r"nothing was removed.*cannot be read.*Input/output error"):
            repair_cache(cache, prune=True)
        if name in (shard_file("32x64-3"), shard_file("texts")):
            assert "unreadable" in {finding.kind for finding in verify_cache(cache)}
    assert snapshot(cache) == before
    # Once it can be read, only what is damaged goes.
    assert not repair_cache(cache).committed
    assert Path(cache, "vae", shard_file("32x64-3")).exists() and not Path(cache, "vae", shard_file("32x64-0")).exists()


def test_another_version_is_named_and_left(cache: str) -> None:
    path = Path(cache, "manifest.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 1}))
    before = snapshot(cache)
    for act in (repair_cache, CacheReader, verify_cache):
        with pytest.raises(CacheError, match="has version 1, this program reads version 4"):
            act(cache)
    assert snapshot(cache) == before


def test_a_cache_of_version_2_is_read_and_stays_what_it_is(cache: str) -> None:
    path = Path(cache, "manifest.json")
    older = replace(Manifest.load(cache), version=2).to_dict()
    path.write_text(json.dumps({**older, "settings": {}}))
    before = CacheReader(cache)
    # What that version's program gave: checkpoints of its runs hold it, and go on.
    assert before.identity == "ba6c6653193497c01a4d556e4ada097e"
    shrink(cache, [0, 2, 5, 11])
    before = CacheReader(cache)
    assert repair_cache(cache, prune=True).compacted and not verify_cache(cache)
    assert json.loads(path.read_text())["version"] == 2 and CacheReader(cache).identity == before.identity


INDEX_3 = "index/eb06d2a6fb30959ba186ac7684b9e216.parquet"
QUARANTINE_3 = "quarantine/503f91468a136bc716dd110379b50eef.parquet"
"""As that version's program wrote the cache of these tests, whose manifest had the hash below."""


def test_a_cache_of_version_3_is_read_and_stays_what_it_is(cache: str) -> None:
    path = Path(cache, "manifest.json")
    now = Manifest.load(cache)
    older = replace(now, version=3)
    content = older.to_dict()
    names = ["index_file", "index_hash", "quarantine_file"]
    assert [name for name in content if name not in now.to_dict()] == names
    path.write_text(json.dumps(content))
    assert Manifest.load(cache) == older
    named = replace(older, index_parts=(Part(INDEX_3, 12),), quarantine_parts=(Part(QUARANTINE_3, 1),))
    assert named.hash() == "714d7831cb17d77af35d4fbec9d6cf08"
    assert CacheReader(cache).identity == now.identity(now.read_index(cache)) == "b69525215b7671fb394d23fc79f4cb46"
    assert inspect_cache(cache)["samples"] == 12 and not verify_cache(cache)
    shrink(cache, [0, 2, 5, 11])
    before = CacheReader(cache)
    assert repair_cache(cache, prune=True).compacted
    assert json.loads(path.read_text())["version"] == 3 and CacheReader(cache).identity == before.identity
    # Damage is found as ever.
    path.write_text(json.dumps({**json.loads(path.read_text()), "index_hash": "0" * 32}))
    with pytest.raises(CacheError, match=r"is damaged .*index_hash is '000"):
        CacheReader(cache)


def test_a_named_file_of_another_version_stops_it(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_VERSION", 3)
    before = snapshot(cache)
    with pytest.raises(CacheError, match="nothing was removed: .*has version 2, this program reads version 3"):
        repair_cache(cache)
    with pytest.raises(CacheError, match="has version 2, this program reads version 3") as caught:
        CacheReader(cache).read([0])
    assert "repair" not in str(caught.value) and snapshot(cache) == before


def shrink(cache: str, keep: list[int]) -> None:
    """Commit only these samples."""
    manifest = Manifest.load(cache)
    index = manifest.read_index(cache).filter([i in keep for i in range(12)])
    counts = {"samples": len(keep), "quarantined": 1, "total": len(keep) + 1, "texts": 3}
    buckets = {"32x64": sum(i < 5 for i in keep), "64x64": sum(i >= 5 for i in keep)}
    small = Manifest(**{**vars(manifest), "buckets": buckets, "counts": counts})
    commit(cache, small, index, manifest.read_quarantine(cache))


@pytest.mark.parametrize("prune", [False, True])
def test_nothing_is_removed_once_the_lease_is_lost(cache: str, monkeypatch: pytest.MonkeyPatch, prune: bool) -> None:
    shrink(cache, [0, 2, 5, 11])
    Path(cache, "vae", ".x.parquet.tmp-1-ab").write_bytes(b"half")
    before = snapshot(cache)
    inspect: Callable[[str], Any] = repair_module._inspect

    def slow(cache: str) -> Any:
        found = inspect(cache)
        Path(cache, lease_module.LEASE).write_text(json.dumps({"owner": "another"}))
        return found

    monkeypatch.setattr(repair_module, "_inspect", slow)
    with pytest.raises(CacheError, match="taken over by another attempt"):
        repair_cache(cache, prune=prune)
    Path(cache, lease_module.LEASE).unlink()
    assert snapshot(cache) == before


def test_a_training_goes_on_after_pruning(cache: str) -> None:
    """Pruning moves rows, which is no other training: the identity in a checkpoint stays."""
    shrink(cache, [0, 2, 5, 11])
    before, reader = Manifest.load(cache), CacheReader(cache)
    assert repair_cache(cache, prune=True).compacted
    after = CacheReader(cache)
    assert after.manifest.hash() != before.hash() and after.identity == reader.identity
    shrunk = Manifest.load(cache)
    index = shrunk.read_index(cache)
    ids = pa.array(["other", *index["sample_id"].to_pylist()[1:]])
    assert shrunk.identity(index.set_column(0, "sample_id", ids)) != reader.identity
    assert shrunk.identity(pa.concat_tables([index.slice(0, 1), index.slice(1)])) == reader.identity


class Killed(BaseException):
    """Stands for a SIGKILL: nothing is tidied up."""


@pytest.mark.parametrize("prune_again", [False, True])
@pytest.mark.parametrize("writes", range(5))
def test_pruning_that_was_stopped_leaves_nothing_for_ever(
    cache: str, monkeypatch: pytest.MonkeyPatch, writes: int, prune_again: bool
) -> None:
    """Stopped in any of its writes, by a process whose id the next one has."""
    shrink(cache, [0, 2, 5, 11])
    known = set(snapshot(cache))
    write, left = storage.write_bytes_atomic, writes

    def stopped(path: str, data: Any, **options: Any) -> None:
        nonlocal left
        if "lease.json" not in path:
            if not left:
                Path(path).parent.mkdir(exist_ok=True)
                Path(path).with_name(f".{Path(path).name}.tmp-{os.getpid()}-0af3").write_bytes(b"half")
                raise Killed
            left -= 1
        write(path, data, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(storage, "write_bytes_atomic", stopped)
        repair_cache(cache, prune=True)
    assert set(snapshot(cache)) - known
    assert repair_cache(cache, prune=prune_again).committed
    if not prune_again:
        tables = {file for file in snapshot(cache) if file.startswith(("index/", "quarantine/"))}
        assert set(snapshot(cache)) <= known | tables  # tables go with the next commit
        repair_cache(cache, prune=True)
    manifest = Manifest.load(cache)
    named = {*manifest.tables(), "manifest.json"}
    index = manifest.read_index(cache)
    named |= {f"{spec.name}/{file}" for spec in manifest.groups for file in named_rows(index, spec)}
    assert set(snapshot(cache)) == named and verify_cache(cache) == []
