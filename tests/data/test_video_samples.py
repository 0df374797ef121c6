"""From rows that name videos, images and lists of them to buckets, cache keys and inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.data.buckets import Bucket, BucketError, SizeRule, assign_bucket
from ray_diffsynth.data.media import MediaError
from ray_diffsynth.data.metadata import read_metadata
from ray_diffsynth.data.samples import bucket_of, load_inputs, pixel_keys
from ray_diffsynth.data.scan import SourceFile, scan_file
from ray_diffsynth.data.spec import SampleSpec
from tests.video_files import draw_clip, grey


def video_rule(num_frames: int = 9, **options: Any) -> SizeRule:
    return SizeRule(num_frames=num_frames, time_division=4, time_remainder=1, **options)


@pytest.mark.parametrize(("available", "frames"), [(1, 1), (4, 1), (5, 5), (8, 5), (9, 9), (10, 9), (500, 9)])
def test_short_videos_have_buckets_of_their_own(available: int, frames: int) -> None:
    rule = video_rule(max_pixels=4096)
    assert assign_bucket(64, 48, rule, available) == Bucket(48, 64, frames)
    assert assign_bucket(64, 48, SizeRule(), available) == Bucket(48, 64), "a model of images takes one frame"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 80, "time_division": 4}, "num_frames=80 is not a multiple of 4 plus 1; use 77 or 81"),
        ({"num_frames": 81}, "makes images"),
        ({"fps": 0.0}, "fps=0"),
    ],
)
def test_rules_that_make_no_bucket(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BucketError, match=message):
        SizeRule(**options)


@pytest.fixture
def spec(tmp_path: Path) -> SampleSpec:
    """A model of image to video with a control video and a reference image as further columns."""
    draw_clip(tmp_path / "a.mp4", 11)
    draw_clip(tmp_path / "b.webm", 6, height=32, width=32)
    draw_clip(tmp_path / "c.gif", 7)
    Image.new("RGB", (80, 64), "blue").save(tmp_path / "d.png")
    columns = {"input_video": "video", "input_image": "video", "prompt": "prompt", "control": "control", "ref": "ref"}
    return SampleSpec(
        base_path=str(tmp_path),
        columns=columns,
        file_params=("input_video", "input_image", "control", "ref"),
        size=video_rule(max_pixels=4096),
        video_params=("input_video",),
        image_params=("input_image", "prompt"),
    )


def row(video: str, control: Any = "c.gif", ref: Any = "d.png") -> dict[str, Any]:
    return {"video": video, "prompt": "a clip", "control": control, "ref": ref}


def scanned(values: dict[str, Any], spec: SampleSpec) -> dict[str, list[SourceFile]]:
    return {
        param: [scan_file(path, animations=spec.size.video) for path in spec.paths(values, param)]
        for param in spec.file_params
    }


def test_one_row_of_everything(spec: SampleSpec) -> None:
    values = row("a.mp4", ref=["d.png", "a.mp4"])
    files = scanned(values, spec)
    bucket = bucket_of(files, spec)
    assert bucket == Bucket(48, 64, 5, images=2), "as long as the control video, whose 7 frames make 5"
    inputs = load_inputs(values, bucket, spec)
    assert [grey(frame) for frame in inputs["input_video"]] == [0, 1, 2, 3, 4]
    assert isinstance(inputs["input_image"], Image.Image) and np.array_equal(
        inputs["input_image"], inputs["input_video"][0]
    )
    assert inputs["control"].shape == (5, 48, 64, 3)
    image, clip = inputs["ref"]
    assert image.size == (64, 48) and clip.shape == (5, 48, 64, 3)
    assert (inputs["height"], inputs["width"], inputs["num_frames"]) == (48, 64, 5)
    assert load_inputs(values, bucket, spec, only=["prompt"]) == {"prompt": "a clip"}


def test_an_image_is_a_video_of_one_frame(spec: SampleSpec) -> None:
    values = row("d.png")
    bucket = bucket_of(scanned(values, spec), spec)
    assert bucket == Bucket(48, 64), "the control video gives one frame too"
    inputs = load_inputs(values, bucket, spec)
    assert inputs["input_video"].shape == inputs["control"].shape == (1, 48, 64, 3)


def test_a_model_of_images_takes_the_first_frame(spec: SampleSpec, tmp_path: Path) -> None:
    still = SampleSpec(str(tmp_path), {"input_image": "image"}, ("input_image",), SizeRule())
    for name in ("a.mp4", "c.gif"):
        file = scan_file(str(tmp_path / name))
        bucket = bucket_of({"input_image": [file]}, still)
        loaded = load_inputs({"image": name}, bucket, still)["input_image"]
        assert loaded.size == (64, 48) and grey(np.asarray(loaded)) == 0


def test_keys_follow_content_bucket_and_rate(spec: SampleSpec) -> None:
    values = row("a.mp4", ref=["d.png", "d.png"])
    files = scanned(values, spec)
    bucket = bucket_of(files, spec)
    keys = pixel_keys(values, files, bucket, spec)
    assert keys["input_video"].startswith(files["input_video"][0].digest) and "48x64x5@" in keys["input_video"]
    assert isinstance(keys["ref"], list) and len(set(keys["ref"])) == 1
    slow = replace(spec, size=video_rule(max_pixels=4096, fps=8))
    other = pixel_keys(values, files, bucket, slow)
    assert other["input_video"] != keys["input_video"] and other["ref"] == keys["ref"], "an image has no rate"
    longer = pixel_keys(values, files, Bucket(48, 64, 9), spec)
    assert longer["input_video"] != keys["input_video"]
    assert longer["input_image"] == keys["input_image"] == other["input_image"], "the first frame stays the first"


def test_a_bad_file_of_a_list_is_named(spec: SampleSpec, tmp_path: Path) -> None:
    (tmp_path / "e.mp4").write_bytes(b"")
    with pytest.raises(MediaError, match=r"e\.mp4"):
        scanned(row("a.mp4", ref=["d.png", "e.mp4"]), spec)


def test_frames_that_would_not_fit_into_memory_are_refused(spec: SampleSpec) -> None:
    values = row("a.mp4")
    files = scanned(values, spec)
    bucket = bucket_of(files, spec)
    needed = max(file.decode_bytes for found in files.values() for file in found) + bucket.area * 3 * 3
    assert bucket_of(files, replace(spec, max_decode_bytes=needed)) == bucket
    with pytest.raises(MediaError, match=r"as 5 frames of 64x48\) takes .* --max_decode_memory"):
        bucket_of(files, replace(spec, max_decode_bytes=needed - 1))
    endless = replace(spec, size=video_rule(10**9 + 1, max_pixels=4096, fps=1e9))
    with pytest.raises(MediaError, match="--max_decode_memory"):
        bucket_of(
            {
                "input_video": [SourceFile("a.mp4", "", 64, 48, "x", 100, 16.0)],
                **{name: [] for name in ("input_image", "control", "ref")},
            },
            endless,
        )


def test_what_a_header_says_of_an_image_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 32)).save(path, icc_profile=b"no profile")
    file = scan_file(str(path))
    assert file.decode_bytes == path.stat().st_size + 64 * 32 * 28 and "profile is damaged" in file.note
    still = SampleSpec(str(tmp_path), {"input_image": "image"}, ("input_image",), SizeRule(), max_decode_bytes=1000)
    with pytest.raises(MediaError, match=r"64x32 pixels\) takes"):
        bucket_of({"input_image": [file]}, still)


def test_a_folder_of_videos(spec: SampleSpec, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a moving square")
    found = read_metadata(str(tmp_path), None, file_columns=["video"], text_columns=["prompt"], required=["video"])
    names = {entry["video"]: entry["prompt"] for entry in found.rows()}
    assert names == {"a.mp4": "a moving square", "b.webm": None, "c.gif": None, "d.png": None}
