"""A damaged image does not end unsplit training: it is left out before, or replaced at its step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ray_diffsynth.data.media import SourceUnavailable, StoreFailure
from ray_diffsynth.data.warnings import collecting
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training import local
from ray_diffsynth.training.data import source
from ray_diffsynth.training.data.decode_check import undecodable
from ray_diffsynth.training.data.opening import open_data
from ray_diffsynth.training.data.source import DatasetSource, SourceError
from tests.training.helpers import make_config


@pytest.fixture
def damaged(tmp_path: Path, images: Path) -> Path:
    """Five captioned images, of which 1.png is cut short behind its header, and 4.png has no caption."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for number, image in enumerate(sorted(images.glob("*.png"))[:5]):
        shutil.copy(image, folder / f"{number}.png")
        if number != 4:
            (folder / f"{number}.txt").write_text(f"tile {number}")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:90])
    return folder


def opened(model: Path, data: Path, output: Path) -> DatasetSource:
    found = open_data(RunPlan.resolve(make_config(model, data, output, task="sft")))
    assert isinstance(found, DatasetSource)
    return found


def test_what_is_damaged_is_left_out_before_the_first_step(
    tiny_qwen: Path, damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    local.run(make_config(tiny_qwen, damaged, output, task="sft", num_epochs=1))
    report = json.loads((output / "report.json").read_text())
    assert report["counts"]["samples"] == report["counts"]["steps"] == 3
    found = {entry["sample_id"]: entry["detail"] for entry in report["warnings"]["row_left_out"]["samples"]}
    assert set(found) == {"1.png", "4.png"} and "no .txt file" in found["4.png"] and "1.png" in found["1.png"]
    assert caplog.text.count("rows that cannot be used") == 1 and "4.png" in caplog.text


def test_in_a_large_dataset_the_next_of_its_size_takes_its_place(
    tiny_qwen: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "CHECKED_IMAGES", 2)
    data = opened(tiny_qwen, damaged, tmp_path / "out")
    assert list(data.sample_ids) == ["0.png", "1.png", "2.png", "3.png"]
    with collecting() as warnings:
        samples = data.fetch([0, 1, 3])
        assert samples[1]["prompt"] == data.fetch([2])[0]["prompt"] == "tile 2"
    assert [(w.kind, w.sample_id) for w in warnings] == [("sample_replaced", "1.png")]
    for number in (2, 3, 0):
        (damaged / f"{number}.png").write_bytes((damaged / "1.png").read_bytes())
    with pytest.raises(SourceError, match=r"none of the 4 samples of one size .*2\.png"):
        data.fetch([2])


def test_the_last_of_a_bucket_is_replaced_by_its_first(
    tiny_qwen: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "CHECKED_IMAGES", 0)
    data = opened(tiny_qwen, damaged, tmp_path / "out")
    (damaged / "3.png").write_bytes((damaged / "1.png").read_bytes())
    with collecting():
        assert data.fetch([3])[0]["prompt"] == "tile 0"


def test_storage_that_fails_is_no_samples_fault() -> None:
    def load(item: int) -> int:
        if item == 1:
            raise ValueError("bad pixels")
        if item == 7:
            raise SourceUnavailable("7.png", "may not be read")
        if item == 8:
            raise StoreFailure("8.png", 5, "503 SlowDown")
        return item

    assert undecodable([0, 1, 2], load) == {1: "bad pixels"}
    with pytest.raises(SourceUnavailable):
        undecodable([0, 7], load)
    with pytest.raises(StoreFailure):
        undecodable([0, 8], load)


def test_nothing_usable_names_the_first_reason(tiny_qwen: Path, damaged: Path, tmp_path: Path) -> None:
    for number in (0, 2, 3, 4):
        (damaged / f"{number}.png").unlink()
    with pytest.raises(SourceError, match=r"no usable sample \(1 rejected; the first, 1\.png: .*1\.png"):
        opened(tiny_qwen, damaged, tmp_path / "out")
