"""The plan, over random indexes: complete, single-bucket, deterministic, local."""

from __future__ import annotations

from collections import Counter, OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_diffsynth.training.plan import Plan, epoch_plan, lanes_of, steps_per_epoch

SETTINGS = settings(max_examples=80, deadline=None)


def index(counts: list[int]) -> dict[str, range]:
    buckets, start = {}, 0
    for number, count in enumerate(counts):
        buckets[f"{16 * (number + 1)}x64"] = range(start, start + count)
        start += count
    return buckets


def make(counts: list[int], shard: int = 5, **changes: int) -> Plan:
    arguments = {"seed": 0, "epoch": 0, "batch_size": 2, "lanes": 2, "repeat": 1, "window": 3, **changes}
    buckets = index(counts)
    return epoch_plan(buckets, rows_per_shard=dict.fromkeys(buckets, shard), **arguments)


def occurrences(plan: Plan) -> Counter[int]:
    return Counter(plan.rows.reshape(-1).tolist())


counts_of_buckets = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)


@SETTINGS
@given(
    counts=counts_of_buckets,
    shard=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    lanes=st.integers(1, 8),
    repeat=st.integers(1, 4),
    window=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_and_the_rest_is_counted(
    counts: list[int], shard: int, batch_size: int, lanes: int, repeat: int, window: int, epoch: int
) -> None:
    plan = make(counts, shard, batch_size=batch_size, lanes=lanes, repeat=repeat, window=window, epoch=epoch)
    buckets = index(counts)
    assert plan.rows.shape == plan.repeats.shape == (plan.steps, lanes, batch_size)
    assert plan.steps == steps_per_epoch(buckets, batch_size=batch_size, lanes=lanes, repeat=repeat)
    seen = occurrences(plan)
    assert set(seen) == set(range(sum(counts)))
    assert min(seen.values()) >= repeat
    assert sum(seen.values()) - repeat * sum(counts) == plan.padded
    # No more than what the last microbatch of each bucket and the last step leave open.
    assert plan.padded <= len(counts) * (batch_size - 1) + (lanes - 1) * batch_size
    for microbatch in plan.rows.reshape(-1, batch_size):
        assert sum(all(row in rows for row in microbatch) for rows in buckets.values()) == 1
    # A (row, repeat) pair keys the noise: none comes twice.
    assert (
        len(set(zip(plan.rows.reshape(-1).tolist(), plan.repeats.reshape(-1).tolist(), strict=True))) == plan.rows.size
    )
    again = make(counts, shard, batch_size=batch_size, lanes=lanes, repeat=repeat, window=window, epoch=epoch)
    assert np.array_equal(again.rows, plan.rows)
    assert np.array_equal(again.repeats, plan.repeats)


@SETTINGS
@given(lanes=st.integers(1, 16), data=st.data())
def test_lanes_are_shared_out_once(lanes: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, lanes))
    served = [lanes_of(rank, world_size, lanes) for rank in range(world_size)]
    assert sorted(lane for own in served for lane in own) == list(range(lanes))
    assert all(served)


def test_more_workers_than_lanes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 workers cannot share 2 lanes.*use 2 workers"):
        lanes_of(0, 3, 2)


def test_epochs_and_seeds_differ_and_a_pass_is_a_permutation() -> None:
    plans = [make([64], batch_size=1, lanes=1, epoch=e, seed=s) for e, s in ((0, 0), (1, 0), (0, 1))]
    orders = [tuple(p.rows.reshape(-1).tolist()) for p in plans]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert all(p.padded == 0 for p in plans)


def test_repeats_count_the_passes() -> None:
    plan = make([12], batch_size=1, lanes=1, repeat=3)
    assert [set(plan.repeats.reshape(3, 12)[i].tolist()) for i in range(3)] == [{0}, {1}, {2}]


def test_buckets_are_interleaved() -> None:
    plan = make([60, 60], shard=4, batch_size=2, lanes=1, window=4)
    second = plan.rows[:, 0, 0] >= 60
    changes = int((second[1:] != second[:-1]).sum())
    assert changes >= 8


def test_a_bucket_smaller_than_the_batch() -> None:
    plan = make([1, 9], batch_size=4, lanes=3)
    assert set(occurrences(plan)) == set(range(10))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_read_amplification(world_size: int, batch_size: int) -> None:
    """Shards read by all workers together / shards there are <= 1.1, with room for two windows in each reader."""
    counts, shard, window = [9000, 5000, 2000], 32, 4
    buckets = index(counts)
    plan = make(counts, shard, batch_size=batch_size, lanes=8, window=window)
    starts = np.array([rows.start for rows in buckets.values()])
    read = 0
    for rank in range(world_size):
        held: OrderedDict[tuple[int, int], None] = OrderedDict()
        lanes = lanes_of(rank, world_size, 8)
        for row in plan.rows[:, lanes].reshape(-1).tolist():
            bucket = int(np.searchsorted(starts, row, side="right")) - 1
            where = (bucket, (row - int(starts[bucket])) // shard)
            if where not in held:
                read += 1
            held[where] = None
            held.move_to_end(where)
            while len(held) > 2 * window * len(lanes):
                held.popitem(last=False)
    assert read / sum(-(-count // shard) for count in counts) <= 1.1


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        make([3], batch_size=0)
    with pytest.raises(ValueError, match="no rows"):
        make([0])
