"""Metadata files: every row is accepted or rejected with a reason."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_diffsynth import storage
from ray_diffsynth.data.formats import READERS, RawRow, RawTable
from ray_diffsynth.data.metadata import DatasetError, Metadata, read_metadata, resolve_file
from ray_diffsynth.data.prompts import read_prompt_file

ROWS = [{"image": "a.png", "prompt": "one, two"}, {"image": "sub/b.png", "prompt": 'a "quoted"\nline'}]


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(tmp_path: Path, name: str, content: str | bytes, **options: Any) -> Metadata:
    found = read_metadata(str(tmp_path), write(tmp_path, name, content), **options)
    assert found.total == len(found.table) + len(found.rejected)
    assert len(set(found.table["sample_id"].to_pylist())) == len(found.table)
    return found


def ids(found: Metadata) -> list[str]:
    return list(found.table["sample_id"].to_pylist())


def reasons(found: Metadata) -> dict[str, str]:
    return {row.sample_id: row.error for row in found.rejected}


CSV = 'image,prompt\r\na.png,"one, two"\r\nsub/b.png,"a ""quoted""\nline"\r\n'


@pytest.mark.parametrize("form", ["csv", "bom", "json", "data", "jsonl", "parquet", "folder default"])
def test_formats_agree(tmp_path: Path, form: str) -> None:
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "m.parquet")
        found = read_metadata(str(tmp_path), str(tmp_path / "m.parquet"))
    elif form == "folder default":
        write(tmp_path, "metadata.csv", CSV)
        found = read_metadata(str(tmp_path))
    else:
        name, content = {
            "csv": ("m.csv", CSV),
            "bom": ("m.csv", "\ufeff" + CSV),
            "json": ("m.json", json.dumps(ROWS)),
            "data": ("m.json", json.dumps({"data": ROWS})),
            "jsonl": ("m.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
        }[form]
        found = read(tmp_path, name, content)
    assert found.table.column_names == ["sample_id", "image", "prompt"]
    assert list(found.rows()) == [{"sample_id": row["image"], **row} for row in ROWS]
    assert (found.rejected, found.total) == ([], 2)


def test_image_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "no_caption.png", "._a.jpg", "notes.md"):
        write(tmp_path, name, b"x")
    write(tmp_path, "a.txt", "\ufeffa caption\n")
    write(tmp_path, "b.txt", "")
    write(tmp_path, "sub/c.txt", "ü")
    found = read_metadata(str(tmp_path))
    assert list(found.rows()) == [
        {"sample_id": "a.jpg", "image": "a.jpg", "prompt": "a caption"},
        {"sample_id": "b.PNG", "image": "b.PNG", "prompt": ""},
        {"sample_id": "sub/c.webp", "image": "sub/c.webp", "prompt": "ü"},
    ]
    assert reasons(found) == {"no_caption.png": "MissingValue"} and ".txt" in found.rejected[0].message
    write(tmp_path, "a.txt", b"\xff\xfe\x00")
    assert reasons(read_metadata(str(tmp_path)))["row-1"] == "MalformedRow"


def test_bad_captions_and_paths_in_csv(tmp_path: Path) -> None:
    lines = [
        "image,prompt",
        "a.png,",
        "b.png,nan",
        "c.png,NaN",
        "d.png,NULL",
        ",caption",
        "e.png,the nan bread",
        "\n",
        "f.png,x",
    ]
    found = read(tmp_path, "m.csv", "\n".join(lines))
    assert ids(found) == ["a.png", "e.png", "f.png"]
    assert found.table["prompt"].to_pylist() == ["", "the nan bread", "x"]
    assert reasons(found) == {name: "MissingValue" for name in ("b.png", "c.png", "d.png", "row-5")}
    assert found.rejected[0].source.endswith("m.csv:3")


def test_bad_values_in_json(tmp_path: Path) -> None:
    text = """[{"image": "a.png", "prompt": null}, {"image": "b.png", "prompt": NaN}, {"image": "c.png"},
        {"image": "d.png", "prompt": 5}, {"image": 7, "prompt": "x"}, {"image": "", "prompt": "x"},
        {"image": null, "prompt": "x"}, {"image": [], "prompt": "x"}, "text", {"image": "e.png", "prompt": "NULL"}]"""
    found = read(tmp_path, "m.json", text)
    assert ids(found) == ["e.png"] and found.table["prompt"].to_pylist() == ["NULL"]
    assert [row.error for row in found.rejected] == [
        *["MissingValue"] * 3,
        *["InvalidValue"] * 2,
        *["MissingValue"] * 3,
        "MalformedRow",
    ]


def test_malformed_rows_name_their_line(tmp_path: Path) -> None:
    found = read(tmp_path, "m.csv", 'image,prompt\na.png,one\nb.png,two,three\nc.png\n"d.png"x,four\ne.png,five')
    assert ids(found) == ["a.png", "e.png"]
    assert [row.message.split(":")[0] for row in found.rejected] == ["line 3", "line 4", "line 5"]
    assert "quote a text that holds a comma" in found.rejected[0].message
    lines = ['{"image": "a.png", "prompt": "x\u2028y"}', "{broken", "", "[1]", '{"image": "b.png", "prompt": "z"}']
    found = read(tmp_path, "m.jsonl", "\n".join(lines))
    assert ids(found) == ["a.png", "b.png"]
    assert [row.message.split(" is")[0] for row in found.rejected] == ["line 2", "line 4"]
    assert {row.error for row in found.rejected} == {"MalformedRow"}


def test_ids_of_repeated_files(tmp_path: Path) -> None:
    rows = ["image,prompt", "a.png,one", "a.png,two", "a.png,one", "a.png,three", "a.png#2,four", "b.png,one"]
    found = read(tmp_path, "m.csv", "\n".join(rows))
    assert ids(found) == ["a.png", "a.png#2", "a.png#3", "a.png#2#2", "b.png"]
    assert reasons(found) == {"a.png#row-3": "DuplicateRow"}
    # a repetition does not rename the others
    without = read(tmp_path, "m.csv", "\n".join(rows[:3] + rows[4:]))
    assert ids(without) == ids(found)


def test_lists_of_files_and_other_columns(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "prompt": "x", "edit_image": ["b.png", "c.png"], "n": 1, "mixed": 1},
        {"image": "d.png", "prompt": "y", "edit_image": "e.png", "n": 2, "mixed": "one"},
    ]
    named = ("image", "prompt", "n", "mixed")
    found = read(tmp_path, "m.json", json.dumps(rows), file_columns=("image", "edit_image"), required=named)
    assert [row["edit_image"] for row in found.rows()] == [["b.png", "c.png"], "e.png"]
    assert [(row["n"], row["mixed"]) for row in found.rows()] == [(1, 1), (2, "one")]
    found = read(tmp_path, "m.json", json.dumps(rows), file_columns=("edit_image",), required=("edit_image",))
    assert ids(found) == ["b.png", "e.png"]
    found = read(tmp_path, "m.json", json.dumps(rows), file_columns=(), required=("prompt",))
    assert ids(found) == ["row-1", "row-2"]


def test_what_is_not_whole_characters_is_rejected_with_the_reason(tmp_path: Path) -> None:
    rows = [
        '{"image": "a.png", "prompt": "fine \\ud83d\\ude00"}',
        '{"image": "b.png", "prompt": "half \\ud83d"}',
        '{"image": "c\\udce9.png", "prompt": "x"}',
        '{"image": "d.png", "prompt": "x", "more": {"deep": ["\\ude00"]}}',
        '{"image": "e.png", "prompt": "x", "\\ud83d": 1}',
    ]
    found = read(tmp_path, "m.jsonl", "\n".join(rows))
    assert ids(found) == ["a.png"] and found.table["prompt"].to_pylist() == ["fine \U0001f600"]
    assert found.table.column_names == ["sample_id", "image", "prompt"]
    assert reasons(found) == dict.fromkeys(["b.png", "c\\udce9.png", "d.png", "e.png"], "InvalidValue")
    assert r"holds 'half \ud83d', which is not whole characters" in found.rejected[0].message
    for row in found.rejected:
        pa.array([row.sample_id, row.source, row.message])


def test_a_file_name_that_is_not_utf8_rejects_its_row(tmp_path: Path) -> None:
    for stem in (b"ok", b"caf\xe9"):
        for suffix, content in ((b".png", b"x"), (b".txt", b"caption")):
            Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), stem + suffix))).write_bytes(content)
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xff.png"))).write_bytes(b"x")
    found = read_metadata(str(tmp_path))
    assert ids(found) == ["ok.png"] and found.total == 3
    assert reasons(found) == {"caf\\udce9.png": "InvalidValue", "\\udcff.png": "MissingValue"}
    for row in found.rejected:
        pa.array([row.sample_id, row.source, row.message])


def fails(tmp_path: Path, message: str, name: str = "m.csv", content: str | bytes = "", **options: Any) -> None:
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, name, content, **options)


def test_unusable_files(tmp_path: Path) -> None:
    fails(
        tmp_path, r"no column 'prompt'; its columns are image, promt; .*did you mean promt", content="image,promt\na,b"
    )
    fails(tmp_path, "no column 'prompt'", "m.jsonl", '{"image": "a"}')
    fails(tmp_path, "no header", content="")
    fails(tmp_path, "has no rows", content="image,prompt\n")
    fails(tmp_path, "has no rows", "m.json", "[]")
    fails(tmp_path, "twice in the header", content="image,image\na,b")
    fails(tmp_path, "sample_id", content="image,prompt,sample_id\na,b,c")
    fails(tmp_path, r"line 2: a quote is opened here", content='image,prompt\na.png,"one\nb.png,two\n')
    fails(tmp_path, r"line 2: a quote is opened here", content='image,prompt\na.png,"one\nb.png,"two"\n')
    fails(tmp_path, r"not UTF-8 \(line 2", content="image,prompt\na.png,ü".encode("latin-1"))
    fails(tmp_path, "line 1, column 2", "m.json", "{broken")
    fails(tmp_path, "name it .jsonl", "m.json", '{"image": "a"}\n{"image": "b"}')
    fails(tmp_path, "list of objects", "m.json", '{"image": "a"}')
    fails(tmp_path, "no readable row; the first: line 1 is not JSON", "m.jsonl", "{broken")
    fails(tmp_path, "not a readable Parquet", "m.parquet", b"PAR1")
    fails(tmp_path, "supported are .csv, .tsv, .json, .jsonl, .parquet", "m.xlsx", b"x")
    for name in ("absent.csv", "absent.parquet"):
        with pytest.raises(DatasetError, match="does not exist; check --dataset_metadata_path"):
            read_metadata(str(tmp_path), str(tmp_path / name))
    with pytest.raises(DatasetError, match="check --dataset_base_path"):
        read_metadata(str(tmp_path / "absent"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(DatasetError, match="neither a metadata file .* nor images"):
        read_metadata(str(tmp_path / "bare"))
    write(tmp_path, "metadata.csv", CSV)
    write(tmp_path, "metadata.json", "[]")
    with pytest.raises(DatasetError, match="several metadata files"):
        read_metadata(str(tmp_path))


def test_all_rows_rejected_is_a_result(tmp_path: Path) -> None:
    found = read(tmp_path, "m.csv", "image,prompt\na.png,nan")
    assert len(found.table) == 0 and found.table.column_names == ["sample_id", "image", "prompt"]


def test_metadata_path_may_be_relative_to_the_dataset(tmp_path: Path) -> None:
    write(tmp_path, "lists/m.csv", CSV)
    assert len(read_metadata(str(tmp_path), "lists/m.csv").table) == 2


def test_resolve_file(tmp_path: Path) -> None:
    base = str(tmp_path)
    assert resolve_file(base, "a.png") == f"{base}/a.png"
    assert resolve_file(base, "/x/a.png") == "/x/a.png"
    assert resolve_file(base, "s3://b/a.png") == "s3://b/a.png"
    assert resolve_file("s3://b/p", "a.png") == "s3://b/p/a.png"
    on_disk = unicodedata.normalize("NFD", "é日本.png")
    write(tmp_path, on_disk, b"x")
    assert resolve_file(base, unicodedata.normalize("NFC", on_disk)) == f"{base}/{on_disk}"


def test_a_dataset_behind_a_url() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/set/metadata.jsonl", b'{"image": "a.png", "prompt": "x"}')
    assert ids(read_metadata("memory://set")) == ["a.png"]
    memory.pipe_file("/pictures/sub/a.png", b"x")
    memory.pipe_file("/pictures/sub/a.txt", b"caption")
    assert read_metadata("memory://pictures").table["prompt"].to_pylist() == ["caption"]


def test_words_for_nothing_in_a_csv(tmp_path: Path) -> None:
    words = ["nan", "NULL", "None", "<NA>", "N/A", "#N/A"]
    rows = "".join(f"{n}.png,{word}\n" for n, word in enumerate(words))
    found = read(tmp_path, "m.csv", f"image,prompt\n{rows}7.png,nano\n8.png,None of them\n")
    assert ids(found) == ["7.png", "8.png"]
    assert reasons(found) == {f"{n}.png": "MissingValue" for n in range(len(words))}


def test_a_long_field_of_a_csv(tmp_path: Path) -> None:
    found = read(tmp_path, "m.csv", f"image,prompt,notes\na.png,x,{'n' * 200_000}\n")
    assert ids(found) == ["a.png"]


def test_a_name_that_stands_twice_in_a_json_object(tmp_path: Path) -> None:
    twice, once = '{"image": "a.png", "prompt": "x", "prompt": "y"}', '{"image": "b.png", "prompt": "z"}'
    found = read(tmp_path, "m.jsonl", f"{twice}\n{once}\n")
    assert ids(found) == ["b.png"]
    assert [row.message for row in found.rejected] == [
        "line 1: 'prompt' stands twice in one object; leave one of them out"
    ]
    fails(tmp_path, "'prompt' stands twice in one object", "m.json", f"[{twice}]")


def test_a_jsonl_that_is_one_list(tmp_path: Path) -> None:
    fails(tmp_path, "name it .json", "m.jsonl", '[\n {"image": "a.png", "prompt": "x"}\n]')


def test_a_format_is_one_function_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_pairs(path: str) -> RawTable:
        lines = storage.read_bytes(path).decode().splitlines()
        values = [dict(zip(("image", "prompt"), line.split(" = "), strict=True)) for line in lines]
        rows = [RawRow(number, f"{path}:{number}", row) for number, row in enumerate(values, 1)]
        return RawTable(("image", "prompt"), tuple(rows))

    monkeypatch.setitem(READERS, ".pairs", read_pairs)
    path = write(tmp_path, "metadata.pairs", "a.png = one\nb.png = two\n")
    for given in (None, path):
        assert read_metadata(str(tmp_path), given).table["prompt"].to_pylist() == ["one", "two"]
    prompts = read_prompt_file(path, (), option="--prompt_path")
    assert [prompt.prompt for prompt in prompts] == ["one", "two"]
    with pytest.raises(DatasetError, match=r"supported are .*\.pairs"):
        read(tmp_path, "m.unknown", "a")
