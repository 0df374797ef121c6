"""Rows by packed keys: what a dictionary would say, whatever the keys are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from ray_diffsynth.preprocess.key_columns import as_strings, first_of_each, is_among, packed, reduced, unpacked
from ray_diffsynth.preprocess.locations import Location, Locations

HEX = "0123456789abcdef"
digests = st.one_of(
    st.text(HEX, min_size=32, max_size=32),
    st.sampled_from(["0" * 32, "00" * 15 + "01", "01" + "00" * 15, "ff" * 16]),  # zeros at an end are no padding
)
names = st.one_of(digests, digests.map(str.upper), st.text(max_size=40), st.sampled_from(["", "k1", "0" * 31]))
files = st.lists(st.lists(names, min_size=1, max_size=5), max_size=8)


@given(files, st.lists(names, max_size=5))
def test_it_is_a_dictionary_in_which_the_first_stays(shards: Sequence[Sequence[str]], others: Sequence[str]) -> None:
    locations, wanted = Locations(), dict[str, Location]()
    for number, keys in enumerate(shards):
        if number % 3 == 2:
            column = pa.chunked_array([pa.array([f"{number}"] * len(keys))])
            rows = np.arange(len(keys))
            locations.add_columns(packed(keys), column, rows, rows + 1)
            wanted = {key: Location(f"{number}", row, row + 1) for row, key in reversed(list(enumerate(keys)))} | wanted
            continue
        locations.add(packed(keys), f"{number}", [number] * len(keys), range(len(keys)))
        for row, key in enumerate(keys):
            wanted.setdefault(key, Location(f"{number}", number, row))
    assert len(locations) == len(wanted)
    for key in (*wanted, *others):
        assert locations.get(key) == wanted.get(key) and (key in locations) == (key in wanted)
    held = {file: [tuple(map(int, p)) for p in locations.places[at, 1:]] for file, at in locations.by_file()}
    by_file: dict[str, list[tuple[int, int]]] = {}
    for place in wanted.values():
        by_file.setdefault(place.file, []).append((place.row_group, place.row))
    assert held == {file: sorted(places) for file, places in by_file.items()}
    kept = is_among(locations.keys, others)
    locations.keep(kept)
    assert {key for key in wanted if key in locations} == set(others) & wanted.keys()


@given(st.lists(digests))
def test_packed_digests_come_back(keys: list[str]) -> None:
    columns = packed(keys)
    assert columns.nbytes == 16 * len(keys)
    assert unpacked(columns) == as_strings(columns).to_pylist() == keys
    assert [keys[at] for at in first_of_each(columns)] == list(dict.fromkeys(keys))


@given(st.lists(st.lists(st.booleans())))
def test_stretches_are_whole_where_all_of_them_is(stretches: list[list[bool]]) -> None:
    values = np.array([value for stretch in stretches for value in stretch], bool)
    ends = np.cumsum([len(stretch) for stretch in stretches], dtype=np.int64)
    assert reduced(values, ends).tolist() == [all(stretch) for stretch in stretches]
