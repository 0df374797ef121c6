"""Row groups and pages are cut by bytes: logic with limits of a few bytes, and files made with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_diffsynth.cache import bounds, layout, store
from ray_diffsynth.cache import tables as tables_module
from ray_diffsynth.cache.commit import commit
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.layout import batch_values, equal_groups, largest_cell, parquet_bytes, row_bytes, row_groups
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.cache.store import GroupRow, write_shard
from ray_diffsynth.cache.verify import verify_cache
from tests.shard_names import stem


def texts(*lengths: int | None) -> pa.Table:
    return pa.table({"n": list(range(len(lengths))), "text": [None if n is None else "x" * n for n in lengths]})


def test_bytes_of_rows_and_cells() -> None:
    table = texts(3, None, 5).append_column("data", pa.array([b"ab", b"", None], pa.large_binary()))
    assert row_bytes(table).tolist() == [5, 0, 5] and largest_cell(table) == 5
    assert largest_cell(texts()) == 0 and largest_cell(pa.table({"n": [1]})) == 0
    parts = pa.chunked_array([pa.array(["a"]), pa.array(["bcd", ""])])
    assert row_bytes(pa.table({"text": parts})).tolist() == [1, 3, 0]


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 60), st.integers(1, 9))
def test_row_groups_cover_all_rows_within_the_limits(lengths: list[int], limit: int, rows: int) -> None:
    cuts = list(row_groups(texts(*lengths), limit, rows))
    assert [row for cut in cuts for row in cut] == list(range(len(lengths)))
    assert all(len(cut) == 1 or sum(lengths[row] for row in cut) <= limit for cut in cuts)
    assert all(len(cut) <= rows for cut in cuts)
    for left, right in zip(cuts, cuts[1:], strict=False):  # no smaller than need be
        assert len(left) == rows or sum(lengths[row] for row in left) + lengths[right.start] > limit


def test_one_large_caption_does_not_make_small_groups_of_the_others() -> None:
    lengths = [1] * 1000 + [500] + [1] * 1000
    assert [len(cut) for cut in row_groups(texts(*lengths), 400)] == [400, 400, 200, 1, 400, 400, 200]


def test_equal_groups() -> None:
    assert equal_groups(texts(5, 5, 5), 15) == 3 and equal_groups(texts(5, 5, 5), 14) == 2
    assert equal_groups(texts(1, 1, 9), 10) == 1 and equal_groups(texts(50, 50), 10) == 1 and equal_groups(texts()) == 1


def test_pages() -> None:
    assert batch_values(texts(3, 3, 3), 9) is None and batch_values(texts(3, 3, 3), 8) == 2
    assert batch_values(texts(1, 90), 60) == 1 and batch_values(texts(*[2] * 3000), 2048) is None
    assert batch_values(texts(*[2] * 3000), 2047) == 1023


def test_a_file_with_small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[Any] = []
    writer = pq.ParquetWriter

    def recorded(*args: Any, **options: Any) -> Any:
        batches.append(options["write_batch_size"])
        return writer(*args, **options)

    monkeypatch.setattr(pq, "ParquetWriter", recorded)
    table = texts(*np.random.default_rng(0).integers(0, 100, 50).tolist())
    data = parquet_bytes(table, limit=300, page=100, compression="zstd")
    file = pq.ParquetFile(pa.BufferReader(data))
    assert file.read().equals(table) and batches == [1] and parquet_bytes(table, limit=300, page=100) is not None
    groups = [file.read_row_group(at) for at in range(file.num_row_groups)]
    assert len(groups) > 5 and all(row_bytes(group).sum() <= 300 for group in groups)
    assert pq.ParquetFile(pa.BufferReader(parquet_bytes(table))).num_row_groups == 1 and batches[-1] is None
    assert pq.read_table(pa.BufferReader(parquet_bytes(texts()))).num_rows == 0


def small(monkeypatch: pytest.MonkeyPatch, limit: int, page: int) -> None:
    def cut(table: pa.Table, rows_per_group: int | None = None, **options: Any) -> pa.Buffer:
        return parquet_bytes(table, rows_per_group, limit=limit, page=page, **options)

    monkeypatch.setattr(tables_module, "parquet_bytes", cut)
    monkeypatch.setattr(store, "parquet_bytes", cut)
    monkeypatch.setattr(store, "equal_groups", lambda table: equal_groups(table, limit))


def test_captions_larger_than_a_row_group(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(cache)
    index, quarantine = manifest.read_index(cache), manifest.read_quarantine(cache)
    captions = ["long " * 200 + str(n) if n % 3 else None for n in range(12)]
    small(monkeypatch, 2000, 500)
    whole = commit(cache, manifest, index, quarantine, captions)
    assert pq.ParquetFile(Path(cache, whole.index_parts[0].file)).num_row_groups > 3
    assert whole.read_captions(cache) == captions and whole.read_index(cache) == index
    assert verify_cache(cache) == [] and len(CacheReader(cache).read(range(12))) == 12


def test_a_shard_larger_than_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [GroupRow(f"k{n}", {"x": torch.full((100,), n, dtype=torch.uint8)}) for n in range(10)]
    small(monkeypatch, 400, 100)
    shard = write_shard(str(tmp_path), "vae", stem("x"), "all", rows, codec="none")
    file = pq.ParquetFile(tmp_path / "vae" / shard.file)
    assert shard.rows_per_group > 1 and file.num_row_groups == -(-10 // shard.rows_per_group)
    for at, row in enumerate(rows):
        group, place = shard.locate(at)
        assert file.read_row_group(group)["key"][place].as_py() == row.key
    assert store.read_shard_header(str(tmp_path), "vae", shard.file, verify=True) == shard


def test_a_value_that_no_page_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_VALUE_BYTES", 99)
    rows = [GroupRow("k", {"x": torch.zeros(100, dtype=torch.uint8)})]
    with pytest.raises(CacheError, match="a value of 100 bytes cannot be stored, only one of up to 99; divide it"):
        write_shard(str(tmp_path), "vae", stem("x"), "all", rows, codec="none")
    assert max(layout.PAGE_BYTES, bounds.MAX_VALUE_BYTES) + (1 << 20) < (1 << 31) - 8  # behind a page that is not full
