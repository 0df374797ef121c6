"""An image beside the target that has another shape keeps it; batches, keys and inputs follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.data.buckets import Bucket, BucketError, SizeRule
from ray_diffsynth.data.samples import bucket_of, load_inputs, pixel_keys
from ray_diffsynth.data.scan import SourceFile, scan_file
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.preprocess.records import Sample
from ray_diffsynth.preprocess.shards import wanted_row


def file(width: int, height: int, path: str = "a.png", digest: str = "digest") -> SourceFile:
    return SourceFile(path, "", width, height, digest)


def edits(size: SizeRule | None = None, **options: Any) -> SampleSpec:
    columns = {"input_image": "image", "edit_image": "edit_image", "prompt": "prompt"}
    return SampleSpec(".", columns, ("input_image", "edit_image"), size or SizeRule(max_pixels=1 << 20), **options)


def bucket(target: tuple[int, int], *references: tuple[int, int], spec: SampleSpec | None = None) -> Bucket:
    files = {"input_image": [file(*target)], "edit_image": [file(*one) for one in references]}
    return bucket_of(files, spec or edits())


@pytest.mark.parametrize(
    ("target", "references", "name"),
    [
        ((512, 512), [(512, 1024)], "512x512+1024x512"),
        ((512, 512), [(512, 512)], "512x512"),
        ((512, 512), [(1024, 1024)], "512x512"),  # of the target's shape: pixel lies on pixel
        ((1000, 667), [(1500, 1000)], "656x992"),
        ((512, 512), [(2048, 4096)], "512x512+1440x720"),
        ((512, 512), [(512, 1024), (512, 512)], "512x512+2+1024x512+512x512"),
        ((512, 512), [(640, 640), (256, 256)], "512x512+2"),
    ],
)
def test_its_own_shape(target: tuple[int, int], references: list[tuple[int, int]], name: str) -> None:
    found = bucket(target, *references)
    assert found.name == name and Bucket.parse(name) == found


def test_rules_of_size_hold_for_references() -> None:
    fixed = edits(SizeRule(height=512, width=512))
    assert bucket((1000, 900), (1000, 900), spec=fixed).name == "512x512", "cut alike"
    assert bucket((1000, 900), (500, 1000), spec=fixed).references == ((720, 352),), "of at most as many pixels"
    aspect = edits(SizeRule(resolutions=(512,)))
    (found,) = bucket((512, 512), (500, 1000), spec=aspect).references
    assert found in {(one.height, one.width) for one in (bucket((w, h), spec=aspect) for w, h in [(500, 1000)])}
    with pytest.raises(BucketError, match=r"b\.png: 8x900 is smaller than 16x16"):
        bucket_of({"input_image": [file(512, 512)], "edit_image": [file(900, 8, "b.png")]}, edits())


def test_a_unit_that_needs_the_targets_size_gets_it() -> None:
    assert bucket((512, 512), (512, 1024), spec=edits(target_sized=("edit_image",))).name == "512x512"


def test_names_and_order() -> None:
    names = ["64x64", "64x64+2", "64x64x5+2+32x16+64x64", "64x64+32x16", "64x64+2+32x16+16x32"]
    assert [Bucket.parse(name).name for name in names] == names
    buckets = [Bucket.parse(name) for name in names]
    assert len({one.sort_key for one in buckets}) == len(names)
    for wrong in ("64", "64x64+", "64x64+0", "64x64+2+3", "64x64+1x2x3", "64x64+32x0", "64x64+2x", "64x64+-1", "+2"):
        with pytest.raises(BucketError, match="is not a bucket"):
            Bucket.parse(wrong)


def test_nothing_of_it_is_cut_away(tmp_path: Path) -> None:
    Image.new("RGB", (512, 512), "white").save(tmp_path / "out.png")
    pixels = np.zeros((1024, 512, 3), np.uint8)
    pixels[:100], pixels[-100:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "ref.png")
    spec = replace(edits(), base_path=str(tmp_path))
    for edit in ("ref.png", ["ref.png"], ["out.png", "ref.png"]):
        row = {"image": "out.png", "edit_image": edit, "prompt": "x"}
        files = {param: [scan_file(path) for path in spec.paths(row, param)] for param in spec.file_params}
        size = bucket_of(files, spec)
        inputs = load_inputs(row, Bucket.parse(size.name), spec)
        last = inputs["edit_image"][-1] if isinstance(edit, list) else inputs["edit_image"]
        assert (np.asarray(last) == pixels).all() and inputs["input_image"].size == (512, 512)
        assert (inputs["height"], inputs["width"]) == (512, 512)


def test_keys_hold_the_size_of_each() -> None:
    spec = edits()
    row = {"image": "a", "edit_image": ["b", "c"], "prompt": ""}
    files = {"input_image": [file(512, 512)], "edit_image": [file(512, 1024), file(512, 512)]}
    size = bucket_of(files, spec)
    keys = pixel_keys(row, files, size, spec)
    assert keys == {"input_image": "digest@512x512", "edit_image": ["digest@1024x512", "digest@512x512"]}


def test_a_group_that_reads_one_of_two_references_finds_its_size(tmp_path: Path) -> None:
    """The row of a decode task holds what tells the sizes apart, and no more."""
    columns = {"input_image": "image", "pose": "pose", "style": "style", "prompt": "prompt"}
    spec = SampleSpec(str(tmp_path), columns, ("input_image", "pose", "style"), SizeRule())
    for name, size in {"a": (64, 64), "b": (32, 64), "c": (96, 32)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    row = {"image": "a.png", "pose": "b.png", "style": "c.png", "prompt": "x"}
    files = {param: [scan_file(path) for path in spec.paths(row, param)] for param in spec.file_params}
    size = bucket_of(files, spec)
    assert size.name == "64x64+64x32+32x96"
    sample = Sample("0", "a.png", row, size, pixel_keys(row, files, size, spec))
    group: Any = SimpleNamespace(inputs=("style",), bucketed=True)
    wanted = wanted_row(group, sample, "key", spec)
    assert set(wanted.row) == {"pose", "style"}
    assert load_inputs(wanted.row, wanted.size, spec, only=("style",))["style"].size == (96, 32)
