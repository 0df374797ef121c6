"""Stage 1 as a service: out of memory, dying encoders, quarantine and its limits, pools, dry runs, resolutions."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data.metadata import Metadata
from ray_diffsynth.data.warnings import warn
from ray_diffsynth.errors import ConfigError, UserError
from ray_diffsynth.preprocess import job
from ray_diffsynth.preprocess.errors import EncoderError
from ray_diffsynth.preprocess.ray_errors import PassCallback
from tests.preprocess.conftest import CAPTIONS, IMAGES, Stage1, files
from tests.preprocess.counting import behave, build_model, calls, digest


def pixels(data: Path, number: int) -> str:
    """What stands for an image in the log of calls."""
    return digest(np.asarray(Image.open(data / f"{number:04d}.png").convert("RGB")))


def quarantine(cache: Path) -> dict[str, tuple[str, str]]:
    rows = Manifest.load(str(cache)).read_quarantine(str(cache)).to_pylist()
    return {row["sample_id"]: (row["error"], row["group"]) for row in rows}


def test_what_failed_is_left_alone_until_it_is_asked_for(tmp_path: Path, few: Path, inline: Stage1) -> None:
    model, cache = build_model(tmp_path / "model", memory=3, too_big=[pixels(few, 5)]), tmp_path / "cache"
    report = inline(model, few, cache)
    assert (report["samples"], report["quarantined"]) == (11, 1)
    assert quarantine(cache) == {"0005.png": ("OutOfMemoryError", "vae")}
    assert report["parameters"]["input_latents"] == {"encoded": 11, "reused": 0}
    behave(model)
    assert inline(model, few, cache)["quarantined"] == 1 and len(calls(model, "vae")) == 11
    report = inline(model, few, cache, retry_quarantined=True)
    assert (report["samples"], report["quarantined"]) == (12, 0)
    assert calls(model, "vae")[11:] == [pixels(few, 5)] and len(CacheReader(str(cache)).read(range(12))) == 12


def test_what_is_said_of_the_data_is_printed_once_and_stands_in_the_report(
    tmp_path: Path,
    few: Path,
    inline: Stage1,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = job.read_dataset

    def telling(*args: Any, **options: Any) -> Metadata:
        warn("caption_cut", "0003.png", "600 tokens cut to 512")
        return read(*args, **options)

    monkeypatch.setattr(job, "read_dataset", telling)
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    expected = [{"sample_id": "0003.png", "detail": "600 tokens cut to 512"}]
    plan = inline(model, few, cache, dry_run=True)
    assert plan["warnings"]["caption_cut"]["samples"] == expected
    assert capsys.readouterr().out.count("0003.png: 600 tokens cut to 512") == 1
    inline(model, few, cache)
    report = json.loads((cache / "report.json").read_text())
    assert report["warnings"]["caption_cut"]["samples"] == expected
    assert caplog.text.count("0003.png: 600 tokens cut to 512") == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_samples_that_kill_their_encoder_are_found(tmp_path: Path, few: Path, stage1: Stage1) -> None:
    """One in each of two shards, which one actor encodes: together more deaths than it had restarts."""
    data = tmp_path / "data"
    shutil.copytree(few, data)
    lines = (data / "metadata.csv").read_text().splitlines()
    (data / "metadata.csv").write_text("\n".join(lines[:5]) + "\n")
    for number in (2, 3):
        Image.open(data / f"{number:04d}.png").resize((64, 96)).save(data / f"{number:04d}.png")
    model = build_model(tmp_path / "model", kill=[pixels(data, 1)], lose=[pixels(data, 2)])
    cache = tmp_path / "cache"
    report = stage1(model, data, cache)
    assert report["buckets"] == {"64x64": 1, "96x64": 1}
    assert quarantine(cache) == {"0001.png": ("EncoderDied", "vae"), "0002.png": ("EncoderDied", "vae")}
    messages = Manifest.load(str(cache)).read_quarantine(str(cache))["message"].to_pylist()
    assert ["device-side assert" in message for message in messages] == [False, True]
    assert set(calls(model, "vae")) == {pixels(data, 0), pixels(data, 3)}
    assert stage1(model, data, cache)["quarantined"] == 2
    # What a pass needs of Ray Data is set for its own datasets, not for those of whoever shares this process.
    context = ray.data.DataContext.get_current()
    assert context.max_errored_blocks == 0 and PassCallback not in context.custom_execution_callback_classes


@pytest.mark.ray
def test_a_mistake_of_the_units_ends_the_run_with_its_text(tmp_path: Path, few: Path, stage1: Stage1) -> None:
    """The monitor brings it to the driver; no sample is blamed, and nothing is encoded a second time."""
    model = build_model(tmp_path / "model", mistake=[pixels(few, 5)])
    with pytest.raises(EncoderError, match=r"vae could not be encoded.*needs 'mask'"):
        stage1(model, few, tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert len(calls(model, "vae")) == len(set(calls(model, "vae")))


def test_too_much_quarantine_fails_and_loses_nothing(tmp_path: Path, few: Path, inline: Stage1) -> None:
    model, cache = build_model(tmp_path / "model", too_big=[pixels(few, 1), pixels(few, 2)]), tmp_path / "cache"
    with pytest.raises(UserError, match=r"2 of 12 rows.*max_quarantine 0\.1.*2 x OutOfMemoryError.*0001\.png"):
        inline(model, few, cache, max_quarantine=0.1)
    assert not (cache / "manifest.json").exists() and len(calls(model, "vae")) == 10
    with pytest.raises(UserError, match="max_quarantine 1 "):
        inline(model, few, cache, max_quarantine=1)
    assert inline(model, few, cache, max_quarantine=2)["samples"] == 10
    assert len(calls(model, "vae")) == 10


@pytest.mark.ray
def test_pools_run_side_by_side_and_give_the_same_cache(tmp_path: Path, few: Path, stage1: Stage1) -> None:
    # However slowly a pool starts: each waits at its first sample for the first sample of the other.
    model, cache = build_model(tmp_path / "model", meet=["vae", "text_encoder"]), tmp_path / "cache"
    pools = {"vae": {"batch_size": 2, "num_cpus": 0.4}, "text_encoder": {"min_size": 1, "max_size": 2}}
    stage1(model, few, cache, pools=pools)
    groups = [line.split()[0] for line in calls(model)]
    turns = sum(1 for before, after in zip(groups, groups[1:], strict=False) if before != after)
    assert turns > 1, "one group waited for the other"
    alone = build_model(tmp_path / "alone")
    stage1(alone, few, tmp_path / "after", batch_size=2)
    assert (cache / "manifest.json").read_bytes() == (tmp_path / "after" / "manifest.json").read_bytes()


def test_a_dry_run_tells_what_and_why_and_writes_nothing(
    tmp_path: Path, few: Path, inline: Stage1, capsys: pytest.CaptureFixture[str]
) -> None:
    model, cache, data = build_model(tmp_path / "model"), tmp_path / "cache", tmp_path / "data"
    shutil.copytree(few, data)
    plan = inline(model, data, cache, dry_run=True)
    assert not cache.exists() and calls(model) == []
    assert plan["buckets"] == {"64x64": 12} and plan["groups"]["vae"]["encode"] == 12
    assert plan["groups"]["text_encoder"]["reasons"] == {
        "a sample that the cache does not have": 12,
        "the empty caption": 1,
    }
    inline(model, data, cache)
    before = snapshot(cache)
    # One caption edited, one image replaced, one row removed, one absent file.
    lines = (data / "metadata.csv").read_text().splitlines()
    lines[1] = "0000.png,something new"
    (data / "metadata.csv").write_text("\n".join([*lines[:-1], "gone.png,nothing"]) + "\n")
    Image.new("RGB", (64, 64), "teal").save(data / "0003.png")
    capsys.readouterr()
    plan = inline(model, data, cache, dry_run=True)
    assert (plan["samples"], plan["quarantined"], plan["removed"]) == (11, 1, 1)
    assert {name: (group["encode"], group["reused"]) for name, group in plan["groups"].items()} == {
        "vae": (1, 10),
        "text_encoder": (1, 10),
    }
    assert plan["groups"]["text_encoder"]["reasons"] == {"another prompt than in the cache": 1}
    text = capsys.readouterr().out
    assert "64x64" in text and "gone.png: MediaError" in text and "nothing was written" in text
    plan = inline(model, data, cache, dry_run=True, dtype="float32")
    assert (
        list(plan["groups"]["vae"]["reasons"]) == ["dtype bfloat16 -> float32"] and plan["groups"]["vae"]["reused"] == 0
    )
    assert snapshot(cache) == before


def snapshot(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_resolutions_make_buckets_and_a_histogram(
    tmp_path: Path, inline: Stage1, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    sizes = [(64, 64), (64, 64), (130, 130), (128, 64), (64, 140)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number, 0, 0)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("an image")
    report = inline(build_model(tmp_path / "model"), data, tmp_path / "cache", resolution="64,128")
    assert sum(report["buckets"].values()) == 5
    assert report["buckets"]["64x64"] == 2 and report["buckets"]["128x128"] == 1 and len(report["buckets"]) == 4
    shown = capsys.readouterr().err
    assert all(f"{name}  {count:>8}" in shown for name, count in report["buckets"].items())
    with pytest.raises(ConfigError, match="'big' is not a side"):
        PreprocessConfig(model="m", dataset_base_path="d", resolution="512,big")


def test_a_run_that_ended_anywhere_is_completed(tmp_path: Path, many: Path, inline: Stage1) -> None:
    """Whatever finished files a run left: the rest is encoded, and the cache is byte for byte that of a whole run."""
    model, whole = build_model(tmp_path / "model"), tmp_path / "whole"
    inline(model, many, whole)
    shards = sorted((whole / "vae").glob("*.parquet")) + sorted((whole / "text_encoder").glob("*.parquet"))
    for kept in (0, 1, 4, len(shards)):
        cache = tmp_path / f"kept-{kept}"
        rows = 0
        for path in shards[len(shards) - kept :]:
            (cache / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, cache / path.parent.name)
            rows += pq.read_metadata(path).num_rows
        before = len(calls(model))
        inline(model, many, cache)
        assert files(cache) == files(whole)
        assert len(calls(model)) - before == IMAGES + CAPTIONS + 1 - rows


def test_tars_are_encoded_like_files(tmp_path: Path, few: Path, inline: Stage1) -> None:
    model, data = build_model(tmp_path / "model"), tmp_path / "tars"
    data.mkdir()
    with tarfile.open(data / "00.tar", "w") as archive:
        for number in range(12):
            (tmp_path / "caption.txt").write_text(f"caption number {number}")
            archive.add(few / f"{number:04d}.png", f"{number:04d}.png")
            archive.add(tmp_path / "caption.txt", f"{number:04d}.txt")
    inline(model, few, tmp_path / "files")
    report = inline(model, data, tmp_path / "cache")
    assert report["samples"] == 12
    for group in ("vae", "text_encoder"):  # the same contents: the same rows
        assert [p.name for p in (tmp_path / "cache" / group).iterdir()] == [
            p.name for p in (tmp_path / "files" / group).iterdir()
        ]
    assert list(CacheReader(str(tmp_path / "cache")).sample_ids)[0] == "00.tar/0000.png"
