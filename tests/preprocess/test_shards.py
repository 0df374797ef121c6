"""The cut into shards: pure, complete, and the same however far an earlier run came."""

from hypothesis import given
from hypothesis import strategies as st

from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.preprocess.shards import Wanted, halves, plan_shards, remaining, shard_rows, split

BUCKETS = {"64x64": Bucket(64, 64), "1024x1024": Bucket(1024, 1024)}


def wanted(key: str, bucket: str) -> Wanted:
    return Wanted(key, f"sample-{key}", {"image": f"{key}.png"}, bucket, BUCKETS[bucket])


rows = st.lists(st.tuples(st.integers(0, 400), st.sampled_from(sorted(BUCKETS))), max_size=500).map(
    lambda pairs: [wanted(f"{bucket}-{number}", bucket) for number, bucket in pairs]
)


@given(rows)
def test_every_key_is_in_one_shard_of_its_bucket(items: list[Wanted]) -> None:
    shards = list(plan_shards(items))
    keys = [key for shard in shards for key in shard.keys]
    assert sorted(keys) == sorted({item.key for item in items})
    for shard in shards:
        assert {row.bucket for row in shard.rows} == {shard.bucket}
        assert 0 < len(shard.rows) <= shard_rows(shard.bucket, BUCKETS[shard.bucket])


@given(rows)
def test_only_the_last_shard_of_a_bucket_is_short(items: list[Wanted]) -> None:
    shards = list(plan_shards(items))
    for bucket, size in BUCKETS.items():
        lengths = [len(shard.rows) for shard in shards if shard.bucket == bucket]
        assert all(length == shard_rows(bucket, size) for length in lengths[:-1])


@given(rows, st.data())
def test_a_rerun_plans_the_same_files(items: list[Wanted], data: st.DataObject) -> None:
    shards = list(plan_shards(items))
    assert [shard.name for shard in plan_shards(items)] == [shard.name for shard in shards]
    finished = [shard for shard in shards if data.draw(st.booleans())]
    done = {key for shard in finished for key in shard.keys}
    rest = [left for shard in shards if (left := remaining(shard, done)) is not None]
    assert [shard.name for shard in rest] == [shard.name for shard in shards if shard not in finished]


def test_remaining_names_what_is_left() -> None:
    (shard,) = plan_shards([wanted(str(number), "64x64") for number in range(5)])
    rest = remaining(shard, {"1", "3"})
    assert rest is not None and rest.keys == ("0", "2", "4") and rest.name != shard.name
    assert remaining(shard, set(shard.keys)) is None


def test_halves_cover_the_shard() -> None:
    (shard,) = plan_shards([wanted(str(number), "64x64") for number in range(3)])
    first, second = halves(shard)
    assert (first.keys, second.keys) == (("0",), ("1", "2")) and len({shard.name, first.name, second.name}) == 3
    assert halves(first) == [first]
    suspects, others = split(shard, ["1"])
    assert (suspects.keys, others.keys) == (("1",), ("0", "2"))
    assert split(shard, []) == split(shard, shard.keys) == []
