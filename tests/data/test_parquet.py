"""The door for Parquet files: plain values of the columns expected, and no code of an extension type, ever."""

from __future__ import annotations

import ast
import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ray_diffsynth
from ray_diffsynth.data.metadata import DatasetError, read_metadata
from ray_diffsynth.storage.parquet import TAIL_BYTES, ColumnError, open_parquet
from tests.arrow_types import NAME, NESTED, Plain, known_to_pyarrow


def parquet(table: pa.Table, **options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def read(data: bytes, expected: pa.Schema | None = None) -> pa.Table:
    with pa.BufferReader(data) as source, open_parquet(source, "f.parquet", expected) as file:
        return file.read()


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("where", NESTED)
def test_an_extension_type_is_refused_by_name_before_its_code_is_reached(where: str, registered: bool) -> None:
    with known_to_pyarrow(registered):
        data = parquet(pa.table({"image": ["a", "b"], "odd": NESTED[where]()}))
        with pytest.raises(
            ColumnError, match=rf"f\.parquet: the column 'odd' holds .*'{NAME}'.* plain .* leave it out"
        ):
            read(data)
        assert Plain.asked == 0


def test_pyarrows_own_extension_types_are_refused_too() -> None:
    columns = {
        "arrow.uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16], pa.binary(16))),
        "arrow.json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1"])),
    }
    for name, column in columns.items():
        with pytest.raises(ColumnError, match=name):
            read(parquet(pa.table({"c": column})))


@pytest.mark.parametrize("registered", [True, False])
def test_a_second_arrow_schema_in_the_footer_hides_nothing(registered: bool) -> None:
    """Which of two entries of one name pyarrow would take is not relied on: it finds none."""
    harmless = pa.table({"c": pa.array([b"a", b"b"])}, metadata={"ARROW:schema": "AAAA"})
    odd = pa.table({"c": NESTED["itself"]()}, metadata={"ARROW:schema": "AAAA"})
    assert read(parquet(harmless)).to_pydict() == {"c": [b"a", b"b"]}
    with known_to_pyarrow(registered):
        try:
            table = read(parquet(odd))
        except ColumnError:
            table = harmless
        assert table["c"].type == pa.binary() and Plain.asked == 0


def test_plain_columns_of_every_shape() -> None:
    table = pa.table(
        {
            "text": ["a", "ü"],
            "often": pa.array(["x", "x"]).dictionary_encode(),
            "long": pa.array(["l", None], pa.large_string()),
            "view": pa.array(["v", "w"], pa.string_view()),
            "number": [1, None],
            "half": pa.array([0.5, 1.5], pa.float16()),
            "files": [["a.png", "b.png"], []],
            "box": [{"at": [1, 2], "of": {"name": "n"}}, None],
            "absent": pa.nulls(2),
        }
    )
    assert read(parquet(table)).to_pylist() == table.to_pylist()


def test_a_footer_longer_than_what_is_fetched_at_once() -> None:
    table = pa.table({f"column {n:05d} {'x' * 60}": [n] for n in range(700)})
    data = parquet(table)
    assert int.from_bytes(data[-8:-4], "little") > TAIL_BYTES
    assert read(data).to_pylist() == table.to_pylist()


def test_columns_must_be_those_expected() -> None:
    expected = pa.schema([("key", pa.string()), ("data", pa.large_binary()), ("shape", pa.list_(pa.int32()))])
    table = pa.table({"key": ["k"], "data": [b"d"], "shape": [[1]]}, schema=expected)
    assert read(parquet(table), expected).num_rows == 1
    with pytest.raises(ColumnError, match=r"has the columns key, data, not key, data, shape"):
        read(parquet(table.select(["key", "data"])), expected)
    with pytest.raises(ColumnError, match=r"has the columns data, key, shape, not"):
        read(parquet(table.select(["data", "key", "shape"])), expected)
    for name, values in {"key": [b"k"], "data": ["d"], "shape": [[1.5]]}.items():
        other = table.set_column(expected.get_field_index(name), name, pa.array(values))
        with pytest.raises(
            ColumnError, match=rf"the column '{name}' is .*, not {expected.field(name).type}".replace("<", "<?")
        ):
            read(parquet(other), expected)


def test_what_is_no_parquet_file_raises_arrows_errors() -> None:
    data = parquet(pa.table({"a": [1]}))
    long = data[:-8] + (2**31).to_bytes(4, "little") + b"PAR1"
    for damaged in (b"", b"PAR1", data[:-1], data[: len(data) // 2], data[:-4] + b"PARE", long, b"\x00" * 40):
        with pytest.raises((OSError, pa.ArrowException)):
            read(damaged)


def dataset(folder: Path, **columns: object) -> str:
    pq.write_table(
        pa.table({"image": ["a.png", "b.png"], "prompt": ["a", "b"], **columns}), folder / "metadata.parquet"
    )
    return str(folder)


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("where", NESTED)
def test_metadata_with_an_extension_type(tmp_path: Path, where: str, registered: bool) -> None:
    with known_to_pyarrow(registered):
        base = dataset(tmp_path, odd=NESTED[where]())
        with pytest.raises(ColumnError, match=rf"metadata\.parquet: the column 'odd' .*{NAME}"):
            read_metadata(base)
        assert Plain.asked == 0


def test_metadata_whose_values_python_cannot_hold(tmp_path: Path) -> None:
    base = dataset(tmp_path, when=pa.array([2**62, 0], pa.timestamp("us")))
    with pytest.raises(DatasetError, match=r"metadata\.parquet is not a readable Parquet file"):
        read_metadata(base)
    twice = pa.Table.from_arrays([pa.array(["a.png"]), pa.array(["p"]), pa.array(["q"])], ["image", "prompt", "prompt"])
    pq.write_table(twice, tmp_path / "metadata.parquet")
    with pytest.raises(DatasetError, match="the column 'prompt' appears twice"):
        read_metadata(base)


READS = {"read_table", "ParquetFile", "ParquetDataset", "read_schema", "read_metadata", "read_pandas", "read_parquet"}
READS |= {"open_stream", "open_file", "RecordBatchStreamReader", "RecordBatchFileReader", "read_feather"}


def test_no_other_module_opens_parquet_or_arrow_files() -> None:
    """Except what travels between the own tasks of a run (`preprocess`), which no file holds."""
    root = Path(ray_diffsynth.__file__).parent
    libraries, found = ("pq", "pa", "pyarrow", "ray", "pd", "feather"), set()
    for path in root.rglob("*.py"):
        calls = (
            node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        )
        named = [func for func in calls if isinstance(func, ast.Attribute) and func.attr in READS]
        if any(ast.unparse(func.value).split(".")[0] in libraries for func in named):
            found.add(f"{path.relative_to(root)}".replace(os.sep, "/"))
    assert found - {"preprocess/messages.py"} == {"storage/parquet.py"}
