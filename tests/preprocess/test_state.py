"""What a run makes of the cache that it finds: lost files, others' commits, another dataset, the scan's cache."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from ray_diffsynth.cache import commit as commit_module
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.lease import LEASE, Lease
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.cluster.nodes import Process
from ray_diffsynth.data.archives import tars as tars_module
from ray_diffsynth.data.scan import SourceFile
from ray_diffsynth.preprocess import catalog as catalog_module
from ray_diffsynth.preprocess import job as job_module
from ray_diffsynth.preprocess import scan as scan_module
from ray_diffsynth.preprocess import scan_cache as scan_cache_module
from ray_diffsynth.preprocess.job import ARCHIVE_LISTINGS
from ray_diffsynth.preprocess.scan import scan_files
from tests.data.dataset_files import tar_of
from tests.preprocess.conftest import CAPTIONS, IMAGES, SHARD, Stage1, files
from tests.preprocess.counting import build_model, calls


def encoded(root: Path, images: Path, inline: Stage1) -> tuple[Path, Path, Path]:
    """A model, a copy of the images, and the cache of both."""
    model, data, cache = build_model(root / "model"), root / "data", root / "cache"
    shutil.copytree(images, data)
    inline(model, data, cache)
    return model, data, cache


@pytest.mark.parametrize("damage", ["absent", "cut", "swapped"])
def test_a_lost_file_is_encoded_again(tmp_path: Path, many: Path, inline: Stage1, damage: str) -> None:
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    inline(model, many, cache)
    whole, before = files(cache), len(calls(model, "vae"))
    shards = sorted((cache / "vae").iterdir())
    if damage == "absent":
        shards[0].unlink()
    elif damage == "cut":
        shards[0].write_bytes(shards[0].read_bytes()[:-60])
    else:
        shutil.copy(next((cache / "text_encoder").iterdir()), shards[0])
    plan = inline(model, many, cache, dry_run=True)
    assert plan["groups"]["vae"]["reasons"] == {"a row that the cache has lost": SHARD}
    assert (plan["groups"]["vae"]["encode"], plan["groups"]["vae"]["reused"]) == (SHARD, IMAGES - SHARD)
    report = inline(model, many, cache)
    assert len(calls(model, "vae")) - before == SHARD and len(calls(model, "text_encoder")) == CAPTIONS + 1
    assert report["samples"] == IMAGES and files(cache) == whole


def test_where_no_machine_is_up_what_has_not_changed_needs_none(
    tmp_path: Path, few: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 of a cache that is whole asks for no machine; with a new image for one, which reads that image alone."""
    model, data, cache = encoded(tmp_path, few, inline)
    read: list[list[str]] = []
    started: list[int] = []

    def scan_some(paths: list[str], *rest: object) -> object:
        read.append(list(paths))
        return scan_files(paths, *rest)  # type: ignore[arg-type]

    def for_scan() -> Process:
        started.append(1)
        return Process({"CPU": 0.5})

    there = SimpleNamespace(up=lambda: False, for_scan=for_scan, for_encoding=lambda runs: {})
    monkeypatch.setattr(job_module, "machines_of", lambda *_: nullcontext(there))
    monkeypatch.setattr(scan_module, "scan_files", scan_some)
    report = inline(model, data, cache)
    assert not started and not read and report["samples"] == 12
    Image.new("RGB", (64, 64), "red").save(data / "0003.png")
    assert inline(model, data, cache)["samples"] == 12
    assert len(started) == 1 and [[Path(path).name for path in paths] for paths in read] == [["0003.png"]]


def test_a_rerun_reads_no_header_of_what_the_index_names(
    tmp_path: Path, few: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, cache = encoded(tmp_path, few, inline)
    read: list[str] = []
    real = catalog_module.read_shard_header
    monkeypatch.setattr(
        catalog_module, "read_shard_header", lambda cache, group, file: read.append(file) or real(cache, group, file)
    )
    Image.new("RGB", (64, 64), "teal").save(data / "new.png")
    with open(data / "metadata.csv", "a") as table:
        table.write("new.png,something new\n")
    assert inline(model, data, cache)["samples"] == 13 and read == []
    # With a row less the index names no file of it whole: what else it holds is found, and not encoded again.
    lines = (data / "metadata.csv").read_text().splitlines()
    (data / "metadata.csv").write_text("\n".join(lines[:1] + lines[2:]) + "\n")
    inline(model, data, cache)
    (data / "metadata.csv").write_text("\n".join(lines) + "\n")
    count = len(calls(model))
    assert inline(model, data, cache)["samples"] == 13 and len(calls(model)) == count and len(set(read)) == 2


def test_what_another_attempt_commits_before_the_lease_is_seen(
    tmp_path: Path, few: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache, other = build_model(tmp_path / "model"), tmp_path / "cache", tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (64, 64)).save(other / "another.png")
    (other / "another.txt").write_text("x")

    class Late(Lease):
        """The lease, which another attempt gives back after a commit."""

        def acquire(self, *arguments: Any) -> None:
            monkeypatch.setattr(job_module, "Lease", Lease)
            inline(model, other, cache)
            super().acquire(*arguments)

    monkeypatch.setattr(job_module, "Lease", Late)
    with pytest.raises(CacheError, match=r"holds the cache of another dataset \(1 samples, such as another.png"):
        inline(model, few, cache)
    assert Manifest.load(str(cache)).counts["samples"] == 1


def test_a_cache_of_version_2_is_refused_before_anything_is_read(tmp_path: Path, few: Path, inline: Stage1) -> None:
    model, data, cache = encoded(tmp_path, few, inline)
    manifest = cache / "manifest.json"
    older = dataclasses.replace(Manifest.load(str(cache)), version=2).to_dict()
    manifest.write_text(json.dumps({**older, "settings": {}}))
    before, count = files(cache), len(calls(model))
    with pytest.raises(CacheError, match=r"cache is a cache of version 2.*Training still reads it.*--output_path"):
        inline(model, data, cache)
    assert files(cache) == before and len(calls(model)) == count


def test_a_cache_of_version_3_goes_on_as_the_newest(tmp_path: Path, few: Path, inline: Stage1) -> None:
    model, data, cache = encoded(tmp_path, few, inline)
    manifest = Manifest.load(str(cache))
    (cache / "manifest.json").write_text(json.dumps(dataclasses.replace(manifest, version=3).to_dict()))
    before, identity, count = files(cache), CacheReader(str(cache)).identity, len(calls(model))
    assert inline(model, data, cache)["samples"] == 12 and len(calls(model)) == count
    assert Manifest.load(str(cache)) == manifest
    assert {name: data for name, data in files(cache).items() if before[name] != data}.keys() == {"manifest.json"}
    assert CacheReader(str(cache)).identity == identity  # what a training that goes on compares


def test_a_run_that_loses_the_cache_at_its_end_commits_nothing(
    tmp_path: Path, few: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    real = commit_module.write_parts

    def slow(*arguments: Any, **options: Any) -> Any:
        (cache / LEASE).write_text(json.dumps({"owner": "another"}))
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(CacheError, match="taken over by another attempt"):
        patch.setattr(commit_module, "write_parts", slow)
        inline(model, few, cache)
    assert not (cache / "manifest.json").exists() and list((cache / "index").glob("*.parquet"))
    (cache / LEASE).unlink()
    count = len(calls(model))
    assert inline(model, few, cache)["samples"] == 12 and len(calls(model)) == count


def test_another_dataset_leaves_the_scan_cache_as_it_is(tmp_path: Path, few: Path, inline: Stage1) -> None:
    model, cache, other = build_model(tmp_path / "model"), tmp_path / "cache", tmp_path / "other"
    inline(model, few, cache)
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    other.mkdir()
    Image.new("RGB", (64, 64)).save(other / "another.png")
    (other / "another.txt").write_text("x")
    with pytest.raises(CacheError, match="holds the cache of another dataset"):
        inline(model, other, cache)
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before


def test_a_rerun_opens_no_archive_and_a_dry_run_keeps_none(
    tmp_path: Path, few: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache, data = build_model(tmp_path / "model"), tmp_path / "cache", tmp_path / "tars"
    members = {f"{n:04d}.png": (few / f"{n:04d}.png").read_bytes() for n in range(6)}
    data.mkdir()
    (data / "a.tar").write_bytes(tar_of({**members, **{f"{n:04d}.txt": b"a caption" for n in range(6)}}))
    opened: list[str] = []
    real = tars_module.opened_archive
    monkeypatch.setattr(tars_module, "opened_archive", lambda path, kind: opened.append(path) or real(path, kind))
    inline(model, data, cache, dry_run=True)
    assert not (cache / ARCHIVE_LISTINGS).exists()
    assert inline(model, data, cache)["samples"] == 6 and len(opened) == 2
    assert inline(model, data, cache)["samples"] == 6 and len(opened) == 2
    assert inline(model, data, cache, dry_run=True) and len(opened) == 2


class Killed(BaseException):
    """The end of the driver."""


def test_a_scan_that_was_killed_goes_on(
    tmp_path: Path, many: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    monkeypatch.setattr(scan_cache_module, "PART_FILES", 32)
    read: list[str] = []
    real = scan_module.scan_file

    def scan(path: str, **options: bool) -> SourceFile:
        if len(read) == 300:
            raise Killed
        read.append(path)
        return real(path, **options)

    monkeypatch.setattr(scan_module, "scan_file", scan)
    monkeypatch.setattr(scan_module, "FILES_PER_TASK", 8)
    monkeypatch.setattr(scan_module, "MAX_PENDING_TASKS", 2)
    with pytest.raises(Killed):
        inline(model, many, cache)
    done = len(read)
    read.clear()
    assert inline(model, many, cache)["samples"] == IMAGES
    assert done == 300 and len(read) <= IMAGES - 300 + 32 + 16
    read.clear()
    inline(model, many, cache)
    assert read == []


def test_a_replaced_file_of_the_same_size_and_time_is_read_again(tmp_path: Path) -> None:
    import os

    path = tmp_path / "a.bmp"  # bytes without compression: the size is that of the pixels
    digests = []
    known: dict[str, SourceFile] = {}
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "new.bmp")
        os.utime(tmp_path / "new.bmp", (1e9, 1e9))
        os.replace(tmp_path / "new.bmp", path)
        (found,) = scan_files([str(path)], known)
        assert isinstance(found, SourceFile)
        known = {str(path): found}
        digests.append(found.digest)
    assert digests[0] != digests[1]
    unstamped = {str(path): SourceFile(str(path), "", 1, 1, "stale")}
    (found,) = scan_files([str(path)], unstamped)
    assert isinstance(found, SourceFile) and found.digest == digests[1]


def test_a_reader_that_opens_during_a_commit(
    tmp_path: Path, few: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_diffsynth.cache.reader import CacheReader

    model, data, cache = encoded(tmp_path, few, inline)
    real = Manifest.load

    def slow(path: str) -> Manifest:
        """The manifest, replaced by another commit before its index is read."""
        manifest = real(path)
        monkeypatch.setattr(Manifest, "load", real)
        (data / "0003.png").unlink()
        inline(model, data, cache)
        return manifest

    monkeypatch.setattr(Manifest, "load", slow)
    assert len(CacheReader(str(cache))) == 11
