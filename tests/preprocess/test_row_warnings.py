"""What encoders say of the data reaches the driver, and a rerun that encodes nothing says it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ray_diffsynth.cache.row_warnings import WARNINGS_FILE, parse_row_warnings, read_warnings, write_warnings
from ray_diffsynth.data.warnings import DataWarnings
from ray_diffsynth.preprocess.encoder import _by_key
from tests.preprocess.conftest import Stage1
from tests.preprocess.counting import behave, build_model, calls

LONG = "one two three four five six"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images; the caption of the first and the last is long."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(LONG if number in (0, 3) else "short")
    return folder


def reported(cache: Path, kind: str) -> list[tuple[str, str]]:
    report = json.loads((cache / "report.json").read_text())
    samples = report["warnings"].get(kind, {"samples": []})["samples"]
    return [(entry["sample_id"], entry["detail"]) for entry in samples]


CUT = [("0.png", "6 tokens cut to 4"), ("3.png", "6 tokens cut to 4")]


def test_each_sample_of_a_cut_caption_is_named_in_this_run_and_in_later_ones(
    tmp_path: Path, data: Path, inline: Stage1, caplog: pytest.LogCaptureFixture
) -> None:
    model, cache = build_model(tmp_path / "model", words=4), tmp_path / "cache"
    inline(model, data, cache)
    assert reported(cache, "caption_cut") == CUT
    assert caplog.text.count("0.png: 6 tokens cut to 4; 3.png: 6 tokens cut to 4") == 1
    before = len(calls(model))
    caplog.clear()
    inline(model, data, cache)
    assert len(calls(model)) == before and reported(cache, "caption_cut") == CUT and "cut to 4" in caplog.text
    plan = inline(model, data, cache, dry_run=True)
    assert plan["warnings"]["caption_cut"]["count"] == 2
    # A run that was killed before its commit left shards, which say it themselves.
    for name in ("manifest.json", WARNINGS_FILE, "report.json"):
        (cache / name).unlink()
    inline(model, data, cache)
    assert len(calls(model)) == before and reported(cache, "caption_cut") == CUT
    (data / "0.txt").write_text("short now")
    (data / "3.txt").unlink()
    inline(model, data, cache)
    assert reported(cache, "caption_cut") == [] and not (cache / WARNINGS_FILE).exists()


def test_a_halved_batch_is_said_of_the_run_that_had_it(tmp_path: Path, data: Path, inline: Stage1) -> None:
    model, cache = build_model(tmp_path / "model", memory=3), tmp_path / "cache"
    inline(model, data, cache)
    assert reported(cache, "batch_halved") == [("", "vae: 4 samples to 2")]
    behave(model)
    inline(model, data, cache)
    assert reported(cache, "batch_halved") == [] and not (cache / WARNINGS_FILE).exists()


@pytest.mark.ray
def test_it_comes_from_actors_too(tmp_path: Path, data: Path, stage1: Stage1, caplog: pytest.LogCaptureFixture) -> None:
    model, cache = build_model(tmp_path / "model", words=4, memory=3), tmp_path / "cache"
    stage1(model, data, cache)
    assert reported(cache, "caption_cut") == CUT
    assert reported(cache, "batch_halved") == [("", "vae: 4 samples to 2")]
    assert caplog.text.count("cut to 4") == 2 and len(caplog.text.split("captions longer")) == 2  # one line for both


def test_what_is_of_no_row_keeps_its_name_and_what_is_known_stays() -> None:
    told = DataWarnings()
    told.add("caption_cut", "a long one", "9 tokens cut to 4")
    told.add("caption_cut", "another text", "8 tokens cut to 4")
    told.add("batch_halved", "", "vae: 2 samples to 1")
    rows: list[tuple[str, dict[str, Any]]] = [
        ("k1", {"prompt": "a long one"}),
        ("k2", {"prompt": "a long one", "seed": 3}),
        ("k3", {"prompt": ""}),
    ]
    assert _by_key(told, rows, {"k3": [["batch_halved", "x"]]}) == {
        "k3": [("batch_halved", "x")],
        "k1": [("caption_cut", "9 tokens cut to 4")],
        "k2": [("caption_cut", "9 tokens cut to 4")],
        "": [("caption_cut", "another text: 8 tokens cut to 4"), ("batch_halved", "vae: 2 samples to 1")],
    }


def test_a_damaged_file_or_a_kind_of_another_version_is_no_warning(tmp_path: Path) -> None:
    cache = str(tmp_path)
    assert read_warnings(cache) == {}
    write_warnings(cache, {"vae": {}, "text_encoder": {"k": (("caption_cut", "d"),)}})
    assert read_warnings(cache) == {"text_encoder": {"k": (("caption_cut", "d"),)}}
    for text in ("", "[1]", '{"vae": 3}', "[" * 100_000, '{"vae": {"k": [["of_tomorrow", "d"], 3, ["caption_cut"]]}}'):
        (tmp_path / WARNINGS_FILE).write_text(text)
        assert not read_warnings(cache).get("vae")
    assert parse_row_warnings([["caption_cut", "b"], ["caption_cut", "a"], ("caption_cut", "a")]) == (
        ("caption_cut", "a"),
        ("caption_cut", "b"),
    )
