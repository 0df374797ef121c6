"""The order, over random indexes: complete, single-bucket, deterministic, local."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_diffsynth.cache.commit import commit
from ray_diffsynth.cache.index import QUARANTINE_SCHEMA, index_schema
from ray_diffsynth.cache.manifest import GroupSpec, Manifest
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.cache.store import GroupRow, write_shard
from ray_diffsynth.training.data.epoch_order import EpochOrder, epoch_order, steps_per_epoch, virtual_ranks_of
from ray_diffsynth.training.data.loader import MicrobatchLoader
from ray_diffsynth.training.data.source import CacheSource, shard_sizes
from ray_diffsynth.training.validation import ValidationLoss
from tests.shard_names import stem

SETTINGS = settings(max_examples=80)


def index(counts: list[int]) -> dict[str, range]:
    buckets, start = {}, 0
    for number, count in enumerate(counts):
        buckets[f"{16 * (number + 1)}x64"] = range(start, start + count)
        start += count
    return buckets


def make(counts: list[int], shard: int = 5, **changes: int) -> EpochOrder:
    arguments = {"seed": 0, "epoch": 0, "batch_size": 2, "virtual_ranks": 2, "repeat": 1, "window": 3, **changes}
    buckets = index(counts)
    return epoch_order(buckets, rows_per_shard=dict.fromkeys(buckets, shard), **arguments)


def occurrences(order: EpochOrder) -> Counter[int]:
    return Counter(order.rows.reshape(-1).tolist())


counts_of_buckets = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)


@SETTINGS
@given(
    counts=counts_of_buckets,
    shard=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    virtual_ranks=st.integers(1, 8),
    repeat=st.integers(1, 4),
    window=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_and_the_rest_is_counted(
    counts: list[int], shard: int, batch_size: int, virtual_ranks: int, repeat: int, window: int, epoch: int
) -> None:
    order = make(
        counts, shard, batch_size=batch_size, virtual_ranks=virtual_ranks, repeat=repeat, window=window, epoch=epoch
    )
    buckets = index(counts)
    assert order.rows.shape == order.repeats.shape == (order.steps, virtual_ranks, batch_size)
    assert order.steps == steps_per_epoch(buckets, batch_size=batch_size, virtual_ranks=virtual_ranks, repeat=repeat)
    counted = occurrences(order)
    assert set(counted) == set(range(sum(counts)))
    assert min(counted.values()) >= repeat
    assert sum(counted.values()) - repeat * sum(counts) == order.padded
    # No more than what the last microbatch of each bucket and the last step leave open.
    assert order.padded <= len(counts) * (batch_size - 1) + (virtual_ranks - 1) * batch_size
    for microbatch in order.rows.reshape(-1, batch_size):
        assert sum(all(row in rows for row in microbatch) for rows in buckets.values()) == 1
    # A (row, repeat) pair keys the noise: none comes twice.
    assert (
        len(set(zip(order.rows.reshape(-1).tolist(), order.repeats.reshape(-1).tolist(), strict=True)))
        == order.rows.size
    )
    again = make(
        counts, shard, batch_size=batch_size, virtual_ranks=virtual_ranks, repeat=repeat, window=window, epoch=epoch
    )
    assert np.array_equal(again.rows, order.rows)
    assert np.array_equal(again.repeats, order.repeats)


@SETTINGS
@given(virtual_ranks=st.integers(1, 16), data=st.data())
def test_virtual_ranks_are_shared_out_once(virtual_ranks: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, virtual_ranks))
    served = [virtual_ranks_of(rank, world_size, virtual_ranks) for rank in range(world_size)]
    assert sorted(virtual_rank for own in served for virtual_rank in own) == list(range(virtual_ranks))
    assert all(served)


def test_more_workers_than_virtual_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 workers cannot share 2 virtual ranks.*use 2 workers"):
        virtual_ranks_of(0, 3, 2)


def test_epochs_and_seeds_differ_and_a_pass_is_a_permutation() -> None:
    epochs = [make([64], batch_size=1, virtual_ranks=1, epoch=e, seed=s) for e, s in ((0, 0), (1, 0), (0, 1))]
    orders = [tuple(p.rows.reshape(-1).tolist()) for p in epochs]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert all(p.padded == 0 for p in epochs)


def test_repeats_count_the_passes() -> None:
    order = make([12], batch_size=1, virtual_ranks=1, repeat=3)
    assert [set(order.repeats.reshape(3, 12)[i].tolist()) for i in range(3)] == [{0}, {1}, {2}]


def test_buckets_are_interleaved() -> None:
    order = make([60, 60], shard=4, batch_size=2, virtual_ranks=1, window=4)
    second = order.rows[:, 0, 0] >= 60
    changes = int((second[1:] != second[:-1]).sum())
    assert changes >= 8


def test_a_bucket_smaller_than_the_batch() -> None:
    order = make([1, 9], batch_size=4, virtual_ranks=3)
    assert set(occurrences(order)) == set(range(10))


@pytest.fixture(scope="module")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache of two groups in three buckets, cut as stage 1 cuts it, whose rows are a few bytes."""
    cache = tmp_path_factory.mktemp("amplification")
    sizes = {"2048x2048": 2000, "1792x2304": 1200, "2304x1792": 600}
    groups = {"vae": "input_latents", "text_encoder": "prompt_embeds"}
    columns: dict[str, list[Any]] = {name: [] for name in index_schema(groups).names}
    for bucket, count in sizes.items():
        ids = [f"{bucket}-{i}" for i in range(count)]
        for name, values in (("sample_id", ids), ("source", ids), ("bucket", [bucket] * count)):
            columns[name] += values
        for group, parameter in groups.items():
            each = shard_sizes([bucket])[bucket]
            assert each == 8
            for start in range(0, count, 10 * each):  # ten shards a file: what is read at a time is a row group
                members = range(start, min(start + 10 * each, count))
                rows = [GroupRow(ids[i], {parameter: torch.full((1, 4), float(i))}) for i in members]
                name = stem(f"{bucket}-{start}")
                shard = write_shard(str(cache), group, name, bucket, rows, codec="none", rows_per_group=each)
                for position, i in enumerate(members):
                    place = (ids[i], shard.file, *shard.locate(position))
                    for column, value in zip(("key", "file", "row_group", "row"), place, strict=True):
                        columns[f"{group}_{column}"].append(value)
    total = sum(sizes.values())
    manifest = Manifest(
        family="qwen_image",
        task="sft:data_process",
        trainable=("dit",),
        parameters=tuple(groups.values()),
        groups=tuple(GroupSpec(name=g, parameters=(p,), fingerprint="x", rows=total) for g, p in groups.items()),
        buckets=sizes,
        counts={"samples": total, "quarantined": 0, "total": total},
        codec="none",
        dtype="float32",
    )
    table = pa.table(columns, schema=index_schema(groups))
    commit(str(cache), manifest, table, QUARANTINE_SCHEMA.empty_table())
    return str(cache)


SHARD_PAIR = 43_000_000
"""Bytes of the two row groups of 32 samples of 1024x1024 and 200 tokens, as Qwen-Image has them; a shard's aim."""


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_read_amplification(tiny_rows: str, world_size: int) -> None:
    """Rows read from files by all workers together / rows trained on is <= 1.1 for 8 virtual ranks, whoever has them.

    With the reader that training opens; its limit in bytes is scaled down with the rows.
    """
    virtual_ranks, read, served = 8, 0, 0
    for rank in range(world_size):
        reader = CacheReader(tiny_rows, verify=False)
        reader.read([0])
        reader.max_cached_bytes = reader.max_cached_bytes * reader.bytes_read // SHARD_PAIR
        source = CacheSource(reader, torch.float32)
        source.keep_open_for(len(virtual_ranks_of(rank, world_size, virtual_ranks)))
        loader = MicrobatchLoader(source, seed=0, batch_size=1, virtual_ranks=virtual_ranks, repeat=1)
        for _ in loader.read(0, loader.steps_per_epoch, rank, world_size, threads=1):
            pass
        read, served = read + reader.rows_read, served + reader.rows_served
    assert read / (served * len(reader.manifest.groups)) <= 1.1


def lines_run(work: Callable[[], Any]) -> int:
    """How many lines of Python `work` runs, each turn of a loop or comprehension counted: the same every time."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def test_what_is_held_out_costs_no_time() -> None:
    """300 000 rows of which 100 are held out: the order, the number of steps and the validation's batches."""
    buckets = {"1024x1024": range(0, 300_000)}
    held_out = np.arange(0, 300_000, 3_000)
    options: dict[str, Any] = {"batch_size": 1, "virtual_ranks": 8}

    def order(without: Any) -> int:
        shards = {"1024x1024": 32}
        return lines_run(
            lambda: epoch_order(buckets, rows_per_shard=shards, seed=0, epoch=0, without=without, **options)
        )

    assert order(held_out) < 1.1 * order(())  # about the same per shard, nothing per row

    def batches() -> None:
        assert steps_per_epoch(buckets, without=held_out, **options) == -(-(300_000 - 100) // 8)
        validated = ValidationLoss(None, held_out, 0, 7)._microbatches(buckets)  # type: ignore[arg-type]
        assert [row for rows in validated for row in rows] == held_out.tolist()

    assert lines_run(batches) < 1000  # a few per batch and row that is held out


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        make([3], batch_size=0)
    with pytest.raises(ValueError, match="no rows"):
        make([0])
