"""Cuts depend on what is near them: whatever comes or goes elsewhere, the parts stay."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from ray_diffsynth.cache.cuts import cut


def parts(ids: list[str], window: int) -> list[tuple[str, ...]]:
    return [tuple(ids[rows.start : rows.stop]) for rows in cut(pa.chunked_array([pa.array(ids, pa.string())]), window)]


IDS = st.lists(st.integers(0, 5000), max_size=300, unique=True).map(lambda numbers: [f"{n}.png" for n in numbers])


@given(IDS, st.integers(1, 30))
def test_parts_cover_all_rows_and_none_is_small(ids: list[str], window: int) -> None:
    found = parts(ids, window)
    assert [one for part in found for one in part] == ids
    assert len(found) == 1 or all(len(part) >= window for part in found)


@given(IDS, st.integers(1, 30), st.integers(0, 300), st.integers(0, 300))
def test_a_row_that_comes_or_goes_changes_at_most_three_parts(ids: list[str], window: int, at: int, row: int) -> None:
    before = set(parts(ids, window))
    more = [*ids[:at], "new.png", *ids[at:]]
    assert len(set(parts(more, window)) - before) <= 3
    fewer = [one for number, one in enumerate(ids) if number != row]
    assert len(set(parts(fewer, window)) - before) <= 3


def test_sizes() -> None:
    sizes = [len(part) for part in parts([f"{n}.png" for n in range(20_000)], 50)]
    assert 1.5 * 50 < sum(sizes) / len(sizes) < 2.5 * 50 and max(sizes) < 10 * 50


def test_ids_that_repeat() -> None:
    assert parts([], 3) == [()] and parts(["a"] * 50, 3) == [("a",) * 50]
    ids = [f"{n // 4}.png" for n in range(400)]  # as in quarantine
    assert [one for part in parts(ids, 10) for one in part] == ids and len(parts(ids, 10)) > 10
