"""A row means what it says: no value depends on what other rows hold."""

from __future__ import annotations

import json
import math
import random
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_diffsynth.data.metadata import Metadata, read_metadata
from ray_diffsynth.data.rows import FILES, RowColumns
from ray_diffsynth.data.spec import file_list
from ray_diffsynth.plan.cache_keys import digest

VALUES: list[Any] = [
    *(0, 1, -7, 2**70, 1.0, 2.5, -0.0, 1e308, math.inf, True, False, "", "1", "true", "null", '"', "ü\U0001f600\u2028"),
    *([], [1, 2.5, "x", None], {}, {"a": 1}, {"b": {"c": [True, None]}, "a": 1.0}, ["one.png"], None),
]
"""Of all JSON's types, many of which Arrow would give one type of a column that holds two of them."""


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, 1 and 1.0 and True told apart."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def read(folder: Path, values: list[Any], name: str = "extra", **options: Any) -> Metadata:
    rows = [{"image": f"{n}.png", "prompt": "p", name: value} for n, value in enumerate(values)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return read_metadata(str(folder), **options)


def test_a_value_is_the_same_alone_and_beside_any_other(tmp_path: Path) -> None:
    given = [value for value in VALUES if value is not None]
    wanted = ("image", "prompt", "extra")
    together = list(read(tmp_path, given, required=wanted).rows())
    assert len(together) == len(given)
    for row, value in zip(together, given, strict=True):
        assert same(row["extra"], value)
        (alone,) = read(tmp_path, [value], required=wanted).rows()
        assert same(alone["extra"], value)


def test_any_pair_of_values_keeps_its_types() -> None:
    columns = RowColumns(("extra",))
    for one in VALUES:
        for other in VALUES:
            table = columns.table([("a", {"extra": one}), ("b", {"extra": other})])
            first, second = columns.rows(table)
            assert same(first["extra"], one) and same(second["extra"], other)


def test_files_stay_a_list_or_a_file_in_each_row(tmp_path: Path) -> None:
    given: list[Any] = ["a.png", ["b.png"], ["c.png", "d.png"], "[e].png"]
    found = read(tmp_path, given, "edit", file_columns=("image", "edit"))
    assert [row["edit"] for row in found.rows()] == given
    assert found.table.schema.field("edit").type == FILES
    found = read(tmp_path, ["a.png", None, ["b.png"]], "edit", file_columns=("image", "edit"))
    assert [row["edit"] for row in found.rows()] == ["a.png", None, ["b.png"]]


def test_the_schema_depends_on_no_value_and_only_used_columns_travel(tmp_path: Path) -> None:
    options: dict[str, Any] = {"file_columns": ("image", "edit"), "required": ("image", "prompt", "extra")}
    schemas = {read(tmp_path, [value], **options).table.schema for value in VALUES if value is not None}
    assert len(schemas) == 1
    assert read(tmp_path, [{"deep": 1}, 2], "unused").table.column_names == ["sample_id", "image", "prompt"]
    columns = RowColumns(("image", "prompt", "n"), frozenset(["image"]), frozenset(["prompt"]))
    rows: list[tuple[str, dict[str, Any]]] = [
        (f"{n}", {"image": f"{n}.png", "prompt": f"{n}", "n": random.choice(VALUES)}) for n in range(40_000)
    ]
    table = columns.table(rows)
    assert table.schema == columns.schema == columns.table([]).schema
    assert all(batch.schema == columns.schema for batch in table.to_batches())
    for row, (sample_id, values) in zip(columns.rows(table), rows, strict=True):
        assert row["sample_id"] == sample_id and same({k: row[k] for k in values}, values)
    (batch,) = table.slice(7, 1).to_batches()
    (seventh,) = columns.rows(batch)
    assert seventh["image"] == "7.png"


def test_keys_of_values_are_those_of_what_was_written() -> None:
    """A value alone in its column had its own key before: that stays."""
    columns = RowColumns(("extra",))
    for value in VALUES:
        (row,) = columns.rows(columns.table([("a", {"extra": value})]))
        assert digest(["group", {"extra": row["extra"]}]) == digest(["group", {"extra": value}])
    assert digest(["group", {"extra": {"b": 1, "a": [2.5]}}]) == "22de48ab47bd960cbb1661e8c225fc81"


def test_a_value_without_json_rejects_its_row_where_it_is_used(tmp_path: Path) -> None:
    table = pa.table({"image": ["a.png", "b.png"], "prompt": ["x", "y"], "when": [date(2026, 1, 1), None]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    assert len(read_metadata(str(tmp_path)).table) == 2
    found = read_metadata(str(tmp_path), required=("image", "prompt", "when"))
    (first, second) = found.rejected
    assert first.error == "InvalidValue" and "'when' holds date, which is no value of JSON" in first.message
    assert second.error == "MissingValue"


def test_nan_of_pandas_is_nothing_in_columns_of_texts_and_files(tmp_path: Path) -> None:
    found = read(tmp_path, [math.nan, "b.png"], "edit", file_columns=("image", "edit"), required=("image",))
    assert [row["edit"] for row in found.rows()] == [None, "b.png"]
    found = read(tmp_path, [math.nan, "negative"], "other", text_columns=("prompt", "other"), required=("image",))
    assert [row["other"] for row in found.rows()] == [None, "negative"]


@pytest.mark.parametrize("text", ['["a.png", 5]', "[]", '[""]'])
def test_a_list_in_a_csv_is_looked_at_once_it_is_read(tmp_path: Path, text: str) -> None:
    quoted = text.replace('"', '""')
    (tmp_path / "metadata.csv").write_text(f'image,prompt,edit\na.png,p,"{quoted}"\n')
    found = read_metadata(str(tmp_path), file_columns=("image", "edit"), parsers={"edit": file_list})
    assert [row.error for row in found.rejected] == ["InvalidValue" if "5" in text else "MissingValue"]
