"""What is enlarged or cut away is told, the worst first, and may be forbidden."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data.buckets import Bucket, BucketError, SizeRule
from ray_diffsynth.data.fit import Fits, SizeFit
from ray_diffsynth.data.metadata import Quarantined
from ray_diffsynth.data.rows import RowColumns
from ray_diffsynth.data.samples import bucket_of, size_fits
from ray_diffsynth.data.scan import SourceFile
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.data.warnings import collecting
from ray_diffsynth.errors import ConfigError
from ray_diffsynth.preprocess.assign import Assigner
from ray_diffsynth.preprocess.records import Sample
from ray_diffsynth.training.data.source import DatasetSource

SPEC = SampleSpec(".", {"input_image": "image"}, ("input_image",), SizeRule(resolutions=(512,)))


def assigned(
    table: list[dict[str, str]], files: dict[str, SourceFile], spec: SampleSpec
) -> tuple[list[Sample], list[Quarantined]]:
    columns = RowColumns(("image",), frozenset({"image"}))
    assigner = Assigner(spec, columns)
    for batch in columns.table((row["sample_id"], row) for row in table).to_batches():
        assigner.add(batch, files)
    return list(assigner.finish()), assigner.bad


def file(width: int, height: int, note: str = "") -> SourceFile:
    return SourceFile(f"{width}x{height}.png", "", width, height, "digest", note=note)


@pytest.mark.parametrize(
    ("size", "bucket", "upscale", "crop"),
    [
        ((512, 512), (512, 512), 1.0, 0.0),
        ((1024, 1024), (512, 512), 0.5, 0.0),
        ((40, 40), (512, 512), 12.8, 0.0),
        ((1024, 512), (512, 512), 1.0, 0.5),
        ((3000, 150), (512, 512), 512 / 150, 0.95),
        ((500, 500), (496, 496), 0.992, 0.0),
    ],
)
def test_how_a_size_fits(size: tuple[int, int], bucket: tuple[int, int], upscale: float, crop: float) -> None:
    found = SizeFit.of(file(*size), Bucket(*bucket))
    assert found.upscale == pytest.approx(upscale) and found.crop == pytest.approx(crop, abs=1e-9)


def rows(*sizes: tuple[int, int]) -> tuple[list[dict[str, Any]], dict[str, SourceFile]]:
    files = {found.path: found for found in (file(*size) for size in sizes)}
    return [{"sample_id": f"id of {name}", "image": name} for name in files], files


def test_the_scan_tells_the_worst_first() -> None:
    table, files = rows((300, 300), (40, 40), (600, 600), (3000, 150))
    files["600x600.png"] = replace(files["600x600.png"], note="its colour profile is damaged and was not used")
    with collecting() as told:
        samples, bad = assigned(table, files, SPEC)
    assert len(samples) == 4 and not bad
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for one in told:
        by_kind.setdefault(one.kind, []).append((one.sample_id, one.detail))
    assert by_kind == {
        "enlarged": [
            ("id of 40x40.png", "40x40 to 512x512 enlarges it 12.8 times"),
            ("id of 3000x150.png", "150x3000 to 256x1024 enlarges it 1.7 times"),
            ("id of 300x300.png", "300x300 to 512x512 enlarges it 1.7 times"),
        ],
        "cropped": [("id of 3000x150.png", "150x3000 to 256x1024 cuts 80% of it away")],
        "left_aside": [("id of 600x600.png", "its colour profile is damaged and was not used")],
    }
    lines = told.lines()
    assert lines[0].startswith("images or videos smaller than their size, and enlarged: 3 (id of 40x40.png: 40x40 to")


def test_limits_put_violators_into_quarantine() -> None:
    table, files = rows((300, 300), (40, 40), (600, 600), (3000, 150))
    with collecting() as told:
        samples, bad = assigned(table, files, replace(SPEC, max_upscale=1.75, max_crop=0.5))
    assert [sample.sample_id for sample in samples] == ["id of 300x300.png", "id of 600x600.png"]
    assert {one.sample_id: one.error for one in bad} == {
        "id of 40x40.png": "BucketError",
        "id of 3000x150.png": "BucketError",
    }
    assert "enlarges it 12.8 times, more than --max_upscale 1.75" in bad[0].message
    assert "cuts 80% of it away, more than --max_crop 0.5" in bad[1].message
    assert [one.sample_id for one in told] == ["id of 300x300.png"], "what is refused is told with its reason"


def test_the_limits_are_reached_but_not_passed() -> None:
    def bucket(width: int, height: int, **limits: float) -> Bucket:
        spec = replace(SPEC, size=SizeRule(height=512, width=512), **limits)
        return bucket_of({"input_image": [file(width, height)]}, spec)

    assert bucket(512, 512, max_upscale=1, max_crop=0).name == bucket(256, 256, max_upscale=2).name == "512x512"
    assert bucket(1024, 512, max_crop=0.5).name == "512x512"
    for width, height, limits in ((511, 511, {"max_upscale": 1.0}), (514, 512, {"max_crop": 0.0})):
        with pytest.raises(BucketError, match="--max_"):
            bucket(width, height, **limits)


def test_a_file_that_two_parameters_read_is_told_once() -> None:
    spec = replace(
        SPEC, columns={"input_video": "video", "input_image": "video"}, file_params=("input_video", "input_image")
    )
    files = {"input_video": [file(40, 40)], "input_image": [file(40, 40)]}
    found = size_fits(files, bucket_of(files, spec), spec)
    assert len(found) == 1
    fits = Fits()
    fits.add("a", found)
    with collecting() as told:
        fits.warn_all()
    assert len(told) == 1


def test_unsplit_training_tells_it_too(tmp_path: Any) -> None:
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("small")
    with collecting() as told:
        DatasetSource(replace(SPEC, base_path=str(tmp_path)), None)
    assert [(one.kind, one.detail) for one in told] == [("enlarged", "40x40 to 512x512 enlarges it 12.8 times")]


@pytest.mark.parametrize("options", [{"max_upscale": 0.5}, {"max_upscale": float("nan")}, {"max_crop": 1.5}])
def test_limits_that_are_none(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        PreprocessConfig(dataset_base_path="d", output_path="o", model="m", **options)  # type: ignore[arg-type]
