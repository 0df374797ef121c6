"""How much quarantine ends a run, and what counts as it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.errors import UserError
from tests.preprocess import counting
from tests.preprocess.conftest import Stage1
from tests.preprocess.counting import build_model, calls


def test_too_much_quarantine_is_said_before_anything_is_encoded(tmp_path: Path, data: Path, inline: Stage1) -> None:
    for number in range(3):
        os.remove(data / f"{number:04d}.png")
    model = build_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"3 of 12 rows .* --max_quarantine 2 allows at most 2 \(3 x MediaError"):
        inline(model, data, tmp_path / "cache", max_quarantine=2)
    assert calls(model) == []


def test_too_much_quarantine_is_said_after_the_group(tmp_path: Path, data: Path, inline: Stage1) -> None:
    bad = counting.digest(np.asarray(Image.open(data / "0001.png").convert("RGB")))
    model = build_model(tmp_path / "model", too_big=[bad])
    with pytest.raises(UserError, match="1 of 12 rows .* allows at most 0"):
        inline(model, data, tmp_path / "cache", max_quarantine=0)
    assert len({line.split()[0] for line in calls(model)}) == 1, "the other group need not be encoded"


def test_repeated_rows_are_weight_not_quarantine(tmp_path: Path, data: Path, inline: Stage1) -> None:
    lines = (data / "metadata.csv").read_text().splitlines()
    (data / "metadata.csv").write_text("\n".join([*lines, lines[1], lines[2]]) + "\n")
    report = inline(build_model(tmp_path / "model"), data, tmp_path / "cache", max_quarantine=0)
    assert (report["samples"], report["quarantined"]) == (12, 2)


def test_reused_counts_what_was_there_whatever_else_failed(tmp_path: Path, data: Path, inline: Stage1) -> None:
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    inline(model, data, cache, pools={})
    Image.new("RGB", (64, 64), "teal").save(data / "0003.png")
    bad = counting.digest(np.asarray(Image.open(data / "0003.png")))
    counting.behave(model, too_big=[bad])
    (data / "metadata.csv").write_text((data / "metadata.csv").read_text().replace("number 5", "number five"))
    report = inline(model, data, cache, pools={})
    assert report["parameters"]["prompt_embeds"] == {"encoded": 1, "reused": 12}
    assert report["parameters"]["input_latents"] == {"encoded": 0, "reused": 11}
    assert json.loads((cache / "report.json").read_text())["groups"][0]["reused"] in (11, 12)
