"""Sizes to buckets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_diffsynth.data.buckets import Bucket, BucketError, SizeRule, aspect_buckets, assign_bucket, rows_per_shard
from ray_diffsynth.errors import UserError

sides = st.integers(1, 5000)


def test_names() -> None:
    assert Bucket(480, 832).name == "480x832" and Bucket(480, 832, 81).name == "480x832x81"
    for bucket in (Bucket(480, 832), Bucket(480, 832, 81)):
        assert Bucket.parse(bucket.name) == bucket
    for wrong in ("480", "480x", "0x16", "axb", "1x2x3x4", "-1x16", "²x16"):
        with pytest.raises(BucketError, match="height x width"):
            Bucket.parse(wrong)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"height": 100, "width": 64}, "height=100 is not a multiple of 16; use height=96"),
        ({"height": 64, "width": 5}, "width=5 is not a multiple of 16; use width=16"),
        ({"height": 64}, "height is set without width"),
        ({"max_pixels": 10}, "max_pixels=10 is below 16x16; use at least 256"),
        ({"resolutions": (8,)}, "resolution=8 is below 16"),
        ({"height": 64, "width": 64, "resolutions": (64,)}, "leave one out"),
    ],
)
def test_a_bad_rule_says_the_fix(rule: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SizeRule(**rule)  # type: ignore[arg-type]


def test_max_pixels_is_diffsynths_rule() -> None:
    rule = SizeRule(max_pixels=1048576)
    assert assign_bucket(1000, 700, rule) == Bucket(688, 992)
    # 2000x1500: scale = sqrt(3e6 / 1048576) = 1.69145…: 886 x 1182, cut to cells of 16
    assert assign_bucket(2000, 1500, rule) == Bucket(880, 1168)
    assert assign_bucket(1024, 1024, rule) == Bucket(1024, 1024)


def test_fixed_size() -> None:
    assert assign_bucket(33, 999, SizeRule(height=64, width=96)) == Bucket(64, 96)


@pytest.mark.parametrize("rule", [SizeRule(), SizeRule(height=64, width=64), SizeRule(resolutions=(64,))])
def test_a_speck_fits_no_bucket(rule: SizeRule) -> None:
    with pytest.raises(BucketError, match="1x1 is smaller than 16x16, the smallest bucket"):
        assign_bucket(1, 1, rule)


def test_a_thread_scaled_below_a_cell_fits_no_bucket() -> None:
    with pytest.raises(BucketError, match="20x100000 scaled to 1024 pixels is 0x2262"):
        assign_bucket(100_000, 20, SizeRule(max_pixels=1024))


def test_aspect_buckets_choose_the_nearest_and_the_largest_covered_resolution() -> None:
    rule = SizeRule(resolutions=(512, 1024))
    assert assign_bucket(2000, 2000, rule) == Bucket(1024, 1024)
    assert assign_bucket(600, 600, rule) == Bucket(512, 512)
    assert assign_bucket(100, 100, rule) == Bucket(512, 512)
    assert assign_bucket(3000, 1500, rule) == Bucket(704, 1408)
    assert assign_bucket(100, 100, SizeRule(resolutions=(64,))) == Bucket(64, 64)


@given(st.integers(16, 2048), st.sampled_from([8, 16, 32]))
def test_aspect_buckets_are_legal_and_symmetric(resolution: int, division: int) -> None:
    if resolution < division:
        return
    table = aspect_buckets(resolution, division)
    assert table and set(table) == {Bucket(b.width, b.height) for b in table}
    for bucket in table:
        assert bucket.area <= resolution**2 and bucket.height % division == bucket.width % division == 0


@given(sides, sides, st.sampled_from([SizeRule(), SizeRule(max_pixels=65536), SizeRule(resolutions=(256, 768))]))
def test_every_bucket_is_legal(width: int, height: int, rule: SizeRule) -> None:
    try:
        bucket = assign_bucket(width, height, rule)
    except BucketError:
        assert min(width, height) < 16 or (rule.max_pixels and width * height > rule.max_pixels)
        return
    assert bucket.height % 16 == bucket.width % 16 == 0 and bucket.height >= 16 and bucket.width >= 16
    if rule.max_pixels:
        assert bucket.area <= rule.max_pixels
    if not rule.resolutions:
        assert bucket.height <= height and bucket.width <= width


def test_rows_per_shard_and_order() -> None:
    assert rows_per_shard(Bucket(64, 64)) == 64
    assert rows_per_shard(Bucket(1024, 1024)) == 32
    assert rows_per_shard(Bucket(480, 832, 81)) == 1
    assert rows_per_shard(Bucket(4096, 4096, 100)) == 1
    buckets = [Bucket(64, 64), Bucket(32, 64), Bucket(16, 16, 9), Bucket(64, 32)]
    order = [b.name for b in sorted(buckets, key=lambda b: b.sort_key)]
    assert order == ["32x64", "64x32", "16x16x9", "64x64"]
