"""What is decoded side by side: no more than the machines' memory and object stores take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.preprocess.decode_passes import (
    MEMORY_SHARE,
    STEP,
    STORE_SHARE,
    DecodePlan,
    decode_bytes,
    plan_decoding,
)
from ray_diffsynth.preprocess.shards import ShardPlan, Wanted

SIZE = Bucket(64, 64)
MIB = 2**20
MACHINE = {"CPU": 4.0, "memory": 8 * 1024.0 * MIB, "object_store_memory": 4 * 1024.0 * MIB}
"""Of which a decode task of half a CPU has half a GiB."""


def shard(name: str, *rows: tuple[int, int]) -> ShardPlan:
    """One with a row of each (decode_bytes, kept_bytes), in MiB."""
    members = (
        Wanted(f"{name}{n}", f"{name}{n}", {}, SIZE.name, SIZE, {}, need * MIB, kept * MIB)
        for n, (need, kept) in enumerate(rows)
    )
    return ShardPlan(name, SIZE.name, tuple(members))


def plan(*shards: ShardPlan, nodes: Sequence[Mapping[str, float]] = (MACHINE,), tasks: int | None = None) -> DecodePlan:
    return plan_decoding(shards, nodes, cpus=0.5, tasks=tasks)


def test_one_row_at_its_peak_beside_what_stays_of_all() -> None:
    assert decode_bytes(shard("a", (100, 10), (30, 20))) == (90 + 30) * MIB
    assert decode_bytes(shard("a", (20, 10), (130, 20))) == (110 + 30) * MIB
    assert decode_bytes(ShardPlan("a", "all", ())) == 0


def test_ordinary_shards_are_one_pass_that_takes_no_task_away() -> None:
    shards = [shard(f"s{n}", (100 + 50 * n, 10)) for n in range(9)]
    (only,) = plan(*shards).passes
    assert list(only.shards) == shards and only.tasks is None and not only.large
    assert only.memory == 512 * MIB and 8 * only.memory <= MEMORY_SHARE * MACHINE["memory"]


def test_what_reads_no_files_reserves_nothing() -> None:
    (only,) = plan(shard("texts", (0, 0), (0, 0))).passes
    assert (only.memory, only.tasks) == (0, None)


def test_large_shards_have_passes_of_their_own_the_largest_last() -> None:
    ordinary, larger, largest = shard("a", (300, 1)), shard("b", (700, 1)), shard("c", (5000, 1))
    found = plan(largest, larger, ordinary)
    assert [each.shards for each in found.passes] == [(ordinary,), (larger,), (largest,)]
    assert [each.memory // MIB for each in found.passes] == [320, 704, 5056]
    assert [each.large for each in found.passes] == [False, True, True]
    close = plan(shard("d", (2000, 1)), larger)
    assert [each.memory // MIB for each in close.passes] == [2048], "one pass where it saves little"


def test_the_smallest_machine_says_what_is_ordinary_and_the_largest_what_is_too_large() -> None:
    small = {"CPU": 4.0, "memory": 1024.0 * MIB, "object_store_memory": 1024.0 * MIB}
    ordinary, large, huge = shard("a", (60, 1)), shard("b", (300, 1)), shard("c", (9000, 1), (100, 1))
    found = plan(ordinary, large, huge, nodes=[small, MACHINE, {"CPU": 4.0}])
    assert [[each.keys for each in item.shards] for item in found.passes] == [[("a0",)], [("b0",), ("c1",)]]
    assert found.too_large.keys() == {"c0"}
    assert found.too_large["c0"].message == (
        "it is too large to decode here: that takes 9.4 GB, and the largest machine has 8.6 GB for tasks; scale it "
        "down, or run again with a machine that has more memory"
    )


def test_a_shard_that_is_too_large_as_a_whole_is_cut() -> None:
    rows = [(3000, 2500)] * 4
    found = plan(shard("a", *rows))
    assert [len(each.rows) for item in found.passes for each in item.shards] == [2, 2] and not found.too_large


@pytest.mark.parametrize(("given", "expected"), [(None, 4), (3, 3), (9, 4)])
def test_what_waits_for_an_encoder_has_room_in_the_object_stores(given: int | None, expected: int) -> None:
    """A decoded shard of 500 MiB: half of 4 GiB takes four of them."""
    (only,) = plan(shard("a", (1510, 1500)), tasks=given).passes
    assert only.tasks == expected and only.tasks * 500 * MIB <= STORE_SHARE * MACHINE["object_store_memory"]


def test_without_a_machines_memory_nothing_is_reserved() -> None:
    shards = (shard("a", (10**6, 1)),)
    (only,) = plan(*shards, nodes=[{"CPU": 2.0}], tasks=3).passes
    assert (only.shards, only.memory, only.tasks) == (shards, 0, 3)
    assert plan().passes == () and plan(nodes=[]).passes == ()


SHARDS = st.lists(
    st.lists(st.tuples(st.integers(0, 12_000), st.integers(0, 3000)), min_size=1, max_size=5).map(
        lambda rows: [(need + kept, kept) for need, kept in rows]
    ),
    max_size=8,
)


@given(SHARDS)
def test_every_row_is_decoded_once_in_what_its_task_reserves_or_is_too_large(rows: list[list[tuple[int, int]]]) -> None:
    shards = [shard(f"s{n}-", *members) for n, members in enumerate(rows)]
    found = plan(*shards)
    assert len(found.passes) <= 3
    keys = [key for item in found.passes for each in item.shards for key in each.keys]
    assert sorted([*keys, *found.too_large]) == sorted(key for each in shards for key in each.keys)
    for item in found.passes:
        assert item.memory % STEP == 0 or item.memory == MACHINE["memory"]
        assert item.memory <= MACHINE["memory"] and all(decode_bytes(each) <= item.memory for each in item.shards)
    for each in shards:  # what fits is not cut
        if decode_bytes(each) <= MACHINE["memory"]:
            assert any(each in item.shards for item in found.passes)
