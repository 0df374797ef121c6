"""The cut into shards: pure, complete, and the same however far an earlier run came."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.data.rows import RowColumns
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.preprocess.key_columns import is_among, packed, unpacked
from ray_diffsynth.preprocess.samples import Samples, SampleWriter
from ray_diffsynth.preprocess.shard_plans import ShardPlans, plan_shards
from ray_diffsynth.preprocess.shards import ALL_SIZES, EMPTY_CAPTION, ShardPlan, Wanted, halves, shard_rows, split

BUCKETS = {"64x64": Bucket(64, 64), "1024x1024": Bucket(1024, 1024)}
SPEC = SampleSpec("/data", {"input_image": "image", "prompt": "prompt"}, ("input_image",))
IMAGES: Any = SimpleNamespace(inputs=("input_image",), bucketed=True)
TEXTS: Any = SimpleNamespace(inputs=("prompt",), bucketed=False)

rows = st.lists(st.tuples(st.integers(0, 400), st.sampled_from(sorted(BUCKETS))), max_size=500)
Pairs = list[tuple[int, str]]


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def samples_of(pairs: Pairs) -> Samples:
    """A sample for each (number of its content, bucket), in the order of a dataset."""
    columns = RowColumns(("image", "prompt"), frozenset({"image"}), frozenset({"prompt"}))
    writer = SampleWriter(SPEC, columns)
    for at, (number, bucket) in enumerate(pairs):
        table = columns.table([(f"{at}", {"image": f"{at}.png", "prompt": f"text {number}"})])
        writer.add(BUCKETS[bucket], table.to_batches()[0], {"input_image": [f"{number}@{bucket}"]}, [(number + 7, 7)])
    return writer.finish()


def keys_of(samples: Samples, group: Any) -> list[str]:
    return [digest(str(inputs)) for inputs in samples.inputs(group.inputs)]


def cut(samples: Samples, group: Any, done: set[str] = frozenset(), empty: str | None = None) -> ShardPlans:  # type: ignore[assignment]
    keys = packed(keys_of(samples, group))
    return plan_shards(group, samples, keys, ~is_among(keys, done), empty)


@given(rows)
@settings(max_examples=30)
def test_every_key_is_in_one_shard_of_its_bucket(pairs: Pairs) -> None:
    samples = samples_of(pairs)
    shards = list(cut(samples, IMAGES))
    keys = [key for shard in shards for key in shard.keys]
    assert sorted(keys) == sorted(set(keys_of(samples, IMAGES)))
    for shard in shards:
        assert {row.bucket for row in shard.rows} == {shard.bucket}
        assert 0 < len(shard.rows) <= shard_rows(shard.bucket, BUCKETS[shard.bucket])
        for row in shard.rows:
            number, _, bucket = row.files["input_image"].partition("@")
            assert bucket == shard.bucket and (row.decode_bytes, row.kept_bytes) == (int(number) + 7, 7)


@given(rows)
@settings(max_examples=30)
def test_the_rows_of_a_shard_are_those_of_their_keys(pairs: Pairs) -> None:
    """Each as the first sample with this key has it, in the order of the samples; the empty caption comes first."""
    samples, empty = samples_of(pairs), digest("")
    first: dict[str, Any] = {}
    for sample, key in zip(samples, keys_of(samples, TEXTS), strict=True):
        first.setdefault(key, sample)
    found = [row for shard in cut(samples, TEXTS, empty=empty) for row in shard.rows]
    assert [row.key for row in found] == [empty, *first]
    assert (found[0].sample_id, found[0].row, found[0].bucket) == (EMPTY_CAPTION, {"prompt": ""}, ALL_SIZES)
    for row, sample in zip(found[1:], first.values(), strict=True):
        assert (row.sample_id, row.row) == (sample.sample_id, {"prompt": sample.row["prompt"]})


@given(rows)
@settings(max_examples=30)
def test_only_the_last_shard_of_a_bucket_is_short(pairs: Pairs) -> None:
    shards = list(cut(samples_of(pairs), IMAGES))
    for bucket, size in BUCKETS.items():
        lengths = [len(shard.rows) for shard in shards if shard.bucket == bucket]
        assert all(length == shard_rows(bucket, size) for length in lengths[:-1])


@given(rows, st.data())
@settings(max_examples=30)
def test_a_rerun_plans_the_same_files(pairs: Pairs, data: st.DataObject) -> None:
    samples = samples_of(pairs)
    plans = cut(samples, IMAGES)
    shards = list(plans)
    assert list(plans.names()) == [shard.name for shard in shards] == [shard.name for shard in cut(samples, IMAGES)]
    assert [plans[at] for at in range(len(plans))] == plans[:] == shards
    finished = [shard for shard in shards if data.draw(st.booleans())]
    done = is_among(plans.keys, {key for shard in finished for key in shard.keys})
    rest = [shard for shard in shards if shard not in finished]
    assert list(plans.without(done)) == plans.holding(~done) == rest


def test_what_is_left_of_a_shard_has_another_name() -> None:
    plans = cut(samples_of([(number, "64x64") for number in range(5)]), IMAGES)
    (shard,) = plans
    (rest,) = plans.without(np.array([False, True, False, True, False]))
    assert rest.keys == tuple(unpacked(plans.keys[::2])) and rest.rows == shard.rows[::2] and rest.name != shard.name
    assert not plans.without(np.ones(5, bool)) and plans.rows == 5


def test_the_samples_are_in_order_of_their_buckets_and_of_the_dataset() -> None:
    pairs = [(number, sorted(BUCKETS)[number % 7 % 2]) for number in range(10_000)]
    samples = samples_of(pairs)
    order = sorted(range(len(pairs)), key=lambda at: BUCKETS[pairs[at][1]].sort_key)
    assert [int(sample.sample_id) for sample in samples] == order
    assert samples.names_of_buckets == {name: sum(bucket == name for _, bucket in pairs) for name in BUCKETS}
    some = np.array([0, 17, 4095, 4096, 9_999, 3])
    assert [int(sample.sample_id) for sample in samples.reader().take(some)] == [order[at] for at in some]


def test_halves_cover_the_shard() -> None:
    keys = ("0", "1", "2")
    shard = ShardPlan("s", "64x64", tuple(Wanted(key, key, {}, "64x64", BUCKETS["64x64"]) for key in keys))
    first, second = halves(shard)
    assert (first.keys, second.keys) == (("0",), ("1", "2")) and len({shard.name, first.name, second.name}) == 3
    assert halves(first) == [first]
    suspects, others = split(shard, ["1"])
    assert (suspects.keys, others.keys) == (("1",), ("0", "2"))
    assert split(shard, []) == split(shard, shard.keys) == []
