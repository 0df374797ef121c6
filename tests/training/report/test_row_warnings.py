"""Warnings of the data while a run trains: named by sample, logged once, kept by checkpoints, in the report."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_diffsynth.cluster.environment import Parcel
from ray_diffsynth.data.warnings import DESCRIPTIONS, DataWarnings, warn
from ray_diffsynth.training import local
from ray_diffsynth.training.data.source import prefetch
from ray_diffsynth.training.ray.sampler_actor import SamplerActor
from ray_diffsynth.training.report.row_warnings import RowWarnings
from tests.training.helpers import make_config

LONG = "a red square on a white table " * 100


@pytest.fixture
def captioned(tmp_path: Path, images: Path) -> Path:
    """Four images, the second with a caption of hundreds of words."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for number, image in enumerate(sorted(images.glob("*.png"))[:4]):
        (folder / f"{number}.png").write_bytes(image.read_bytes())
        (folder / f"{number}.txt").write_text(LONG if number == 1 else f"tile {number}")
    return folder


def test_unsplit_training_names_the_sample_of_a_cut_caption_once(
    tiny_qwen: Path, captioned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    settings = {"max_sequence_length": 64}
    changes: dict[str, Any] = {"task": "sft", "max_steps": 9, "save_steps": 2, "pipeline_settings": settings}
    with caplog.at_level(logging.INFO):
        local.run(make_config(tiny_qwen, captioned, output, **changes))
    assert caplog.text.count(DESCRIPTIONS["caption_cut"]) == 1
    report = json.loads((output / "report.json").read_text())
    found = report["warnings"]["caption_cut"]
    assert found["count"] == 1 and found["samples"][0]["sample_id"] == "1.png"
    assert found["samples"][0]["detail"].endswith(" tokens cut to 64")
    assert "warnings" not in report["result"]
    # Finished already, so nothing is encoded: what was logged before is known, and not logged again.
    caplog.clear()
    with caplog.at_level(logging.INFO):
        local.run(make_config(tiny_qwen, captioned, output, **changes))
    assert DESCRIPTIONS["caption_cut"] not in caplog.text
    assert json.loads((output / "report.json").read_text())["warnings"] == report["warnings"]


def test_it_is_told_when_it_is_new() -> None:
    own = DataWarnings()
    row_warnings = RowWarnings(own, [["caption_cut", "a", "1"], ["of tomorrow", "x", "y"]])
    row_warnings.gather(1)
    assert row_warnings.unreported() == [] and row_warnings.all.rows() == [["caption_cut", "a", "1"]]
    own.add("caption_cut", "a", "1")
    own.add("caption_cut", "b", "2")
    row_warnings.gather(1)
    assert row_warnings.unreported() == [f"{DESCRIPTIONS['caption_cut']}: 1 (b: 2)"] and row_warnings.unreported() == []
    assert row_warnings.all.rows() == [["caption_cut", "a", "1"], ["caption_cut", "b", "2"]]


def test_what_is_said_on_a_thread_that_reads_ahead_comes_to_who_asked() -> None:
    from ray_diffsynth.data.warnings import collecting

    with collecting() as warnings:
        list(prefetch(range(6), lambda item: warn("caption_cut", str(item), "d"), depth=3, threads=3))
    assert sorted(warning.sample_id for warning in warnings) == list("012345")


def test_the_prompts_of_sample_images_are_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_diffsynth.training.ray import worker

    class Collector:
        def __init__(self) -> None:
            self.rows: list[list[str]] = []
            self.warn = self

        def remote(self, rows: list[list[str]]) -> None:
            self.rows += rows

    class Painter:
        def draw(self, step: int, tensors: Any) -> str:
            warn("caption_cut", "a long prompt", "600 tokens cut to 512")
            return f"{step}.png"

    monkeypatch.setattr(worker.ray, "get", lambda value: value)
    collector = Collector()
    actor = SamplerActor.__ray_metadata__.modified_class(  # type: ignore[attr-defined]
        Parcel(None, (None, ["a long prompt"])), False, collector
    )
    actor._sampler = Painter()
    actor.draw(1, {})
    actor.draw(2, {"w": torch.zeros(1).numpy()})
    assert actor.finish() == ["1.png", "2.png"]
    assert collector.rows == [["caption_cut", "a long prompt", "600 tokens cut to 512"]]
