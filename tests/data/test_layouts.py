"""Datasets as people have them: each layout, and the rows and images that come out."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_diffsynth import storage
from ray_diffsynth.data import media
from ray_diffsynth.data.formats import parquet_rows
from ray_diffsynth.data.media import MediaError, fetch
from ray_diffsynth.data.metadata import DatasetError, read_metadata, resolve_file
from ray_diffsynth.data.metadata_files import metadata_path_from_root
from ray_diffsynth.data.patterns import expand_braces, split_list
from ray_diffsynth.data.scan import scan_file
from ray_diffsynth.data.warnings import collecting
from ray_diffsynth.storage import parquet_member
from tests.data.dataset_files import HF_IMAGE, hf_parquet, jsonl, png, put, tar_of, zip_of

Rows = list[tuple[str, str, int]]
"""Sample id, caption, and the seed of the image's pixels."""
HF_ROWS = [{"file_name": "0.png", "text": "zero"}, {"file_name": "sub/1.png", "text": "one"}]
IMAGES = {"0.png": png(0), "sub/1.png": png(1)}
BY_NAME: Rows = [("0.png", "zero", 0), ("sub/1.png", "one", 1)]


def cells(*seeds: int) -> list[dict[str, Any]]:
    return [{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds]


def shard(*seeds: int, **options: Any) -> bytes:
    return hf_parquet({"image": cells(*seeds), "text": [f"text {seed}" for seed in seeds]}, **options)


def wds(*seeds: int) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for seed in seeds:
        members |= {f"{seed}.png": png(seed), f"{seed}.txt": f"text {seed}".encode()}
    return members


def listed(archive: str, *seeds: int) -> Rows:
    return [(f"{archive}/{seed}.png", f"text {seed}", seed) for seed in seeds]


SHARDS = "data/train-0000{}-of-00002.parquet"
LAYOUTS: dict[str, tuple[dict[str, bytes | str], dict[str, Any], Rows]] = {
    "imagefolder, jsonl": ({"metadata.jsonl": jsonl(HF_ROWS), **IMAGES}, {}, BY_NAME),
    "imagefolder, csv": ({"metadata.csv": "file_name,text\n0.png,zero\nsub/1.png,one\n", **IMAGES}, {}, BY_NAME),
    "imagefolder, parquet": (
        {"metadata.parquet": hf_parquet({"file_name": ["0.png", "sub/1.png"], "text": ["zero", "one"]}), **IMAGES},
        {},
        BY_NAME,
    ),
    "imagefolder of a split": (
        {"train/metadata.jsonl": jsonl(HF_ROWS), **{f"train/{name}": data for name, data in IMAGES.items()}},
        {},
        [(f"train/{name}", text, seed) for name, text, seed in BY_NAME],
    ),
    "a split's table with columns of its own": (
        {"train/metadata.csv": "image,prompt\n0.png,zero\nsub/1.png,one\n"}
        | {f"train/{name}": data for name, data in IMAGES.items()},
        {},
        [(f"train/{name}", text, seed) for name, text, seed in BY_NAME],
    ),
    "images beside the zip that they came in": (
        {"all.zip": zip_of(wds(7)), "images/0.png": png(0), "images/0.txt": "zero"},
        {},
        [("images/0.png", "zero", 0)],
    ),
    "images beside tables": (
        {"train.parquet": shard(7), "train/metadata.csv": "image,prompt\n", "0.png": png(0), "0.txt": "zero"},
        {},
        [("0.png", "zero", 0)],
    ),
    "imagefolder, the split that is asked for": (
        {
            "train/metadata.jsonl": jsonl(HF_ROWS),
            "test/metadata.csv": "file_name,text\n7.png,seven\n",
            "test/7.png": png(7),
        },
        {"split": "test"},
        [("test/7.png", "seven", 7)],
    ),
    "columns by option": (
        {"metadata.csv": "photo,image,caption\n0.png,x,zero\nsub/1.png,y,one\n", **IMAGES},
        {"column_names": {"image": "photo", "prompt": "caption"}},
        BY_NAME,
    ),
    "image and prompt before the names of datasets": (
        {"metadata.csv": "image,prompt,file_name,text\n0.png,zero,x,y\nsub/1.png,one,x,z\n", **IMAGES},
        {},
        BY_NAME,
    ),
    "parquet shards": (
        {SHARDS.format(0): shard(0, 1, 2), SHARDS.format(1): shard(3), "README.md": "x"},
        {},
        [*listed(SHARDS.format(0), 0, 1, 2), *listed(SHARDS.format(1), 3)],
    ),
    "parquet of the split that is asked for": (
        {SHARDS.format(0): shard(0), "data/validation-00000-of-00001.parquet": shard(4, 5)},
        {"split": "validation"},
        listed("data/validation-00000-of-00001.parquet", 4, 5),
    ),
    "parquet without paths": (
        {
            "train.parquet": hf_parquet(
                {"image": [{"bytes": png(n), "path": None} for n in (8, 9)], "text": ["text 8", "text 9"]}
            )
        },
        {},
        [("train.parquet/0", "text 8", 8), ("train.parquet/1", "text 9", 9)],
    ),
    "parquet with paths alone": (
        {
            "train-00000-of-00001.parquet": hf_parquet(
                {"image": [{"bytes": None, "path": name} for name in IMAGES], "text": ["zero", "one"]}
            ),
            **IMAGES,
        },
        {},
        BY_NAME,
    ),
    "tars by braces": (
        {f"shards/{n:06d}.tar": tar_of(wds(n)) for n in range(3)},
        {"metadata_path": "shards/{000000..000001}.tar"},
        [*listed("shards/000000.tar", 0), *listed("shards/000001.tar", 1)],
    ),
    "zip": ({"a.zip": zip_of(wds(0, 1)), "b.zip": zip_of(wds(2))}, {}, [*listed("a.zip", 0, 1), *listed("b.zip", 2)]),
    "zip, stored": ({"a.zip": zip_of(wds(0, 1), zipfile.ZIP_STORED)}, {}, listed("a.zip", 0, 1)),
    "zip with metadata": (
        {"a.zip": zip_of({"in/metadata.jsonl": jsonl(HF_ROWS).encode(), **{f"in/{k}": v for k, v in IMAGES.items()}})},
        {},
        [(f"a.zip/in/{name}", text, seed) for name, text, seed in BY_NAME],
    ),
    "several files, columns of their own": (
        {
            "a.jsonl": jsonl([{"image": "0.png", "prompt": "zero", "more": 1}]),
            "b.csv": "file_name,text,other\nsub/1.png,one,2\n",
            **IMAGES,
        },
        {"metadata_path": "a.jsonl,b.csv"},
        BY_NAME,
    ),
    "several files by a pattern": (
        {"m/1.tsv": "image\tprompt\n0.png\tzero\n", "m/2.tsv": "image\tprompt\nsub/1.png\tone\n", **IMAGES},
        {"metadata_path": "m/*.tsv"},
        BY_NAME,
    ),
    "a name that looks like a pattern": (
        {"a,[b]{c}.jsonl": jsonl([{"image": "0.png", "prompt": "zero"}]), **IMAGES},
        {"metadata_path": "a,[b]{c}.jsonl"},
        BY_NAME[:1],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(tmp_path: Path, layout: str) -> None:
    files, options, expected = LAYOUTS[layout]
    put(tmp_path, files)
    found = read_metadata(str(tmp_path), **options)
    rows = list(found.rows())
    assert [(row["sample_id"], row["prompt"]) for row in rows] == [(name, text) for name, text, _ in expected]
    assert not found.rejected
    for row, (_, _, seed) in zip(rows, expected, strict=True):
        path = resolve_file(str(tmp_path), row["image"])
        assert storage.read_bytes(path) == png(seed) and storage.file_size(path) == len(png(seed))
        scanned, plain = scan_file(path), put(tmp_path, {"plain.bin": png(seed)}) / "plain.bin"
        # The same bytes are the same content, wherever they lie.
        assert scanned.digest == scan_file(str(plain)).digest and (scanned.width, scanned.height) == (48, 32)


def test_moved_data_gives_the_same_rows(tmp_path: Path) -> None:
    for layout in ("parquet shards", "zip", "tars by braces", "imagefolder of a split"):
        files, options, _ = LAYOUTS[layout]
        found = [list(read_metadata(str(put(tmp_path / layout / at, files)), **options).rows()) for at in "ab"]
        assert found[0] == found[1]


def test_what_is_recognised_is_told_in_a_line(tmp_path: Path) -> None:
    put(tmp_path, LAYOUTS["imagefolder, csv"][0])
    with collecting() as warned:
        read_metadata(str(tmp_path))
    (warning,) = warned
    assert warning.kind == "file_form" and "file_name as image, text as prompt" in warning.detail
    put(tmp_path / "two", {SHARDS.format(0): shard(0), "data/test-00000-of-00001.parquet": shard(1)})
    with collecting() as warned:
        assert len(read_metadata(str(tmp_path / "two")).table) == 1
    assert any("only train is read; --dataset_split chooses" in warning.detail for warning in warned)


def test_further_images_by_name_and_in_lists(tmp_path: Path) -> None:
    pairs = pa.array([cells(1, 2), cells(3), []], pa.list_(HF_IMAGE))
    columns = {"image": cells(0, 4, 5), "text": ["a", "b", "c"], "edit": pairs, "cond": cells(6, 7, 8)}
    put(tmp_path, {"train.parquet": hf_parquet(columns)})
    found = read_metadata(
        str(tmp_path), file_columns=("image", "edit", "control"), column_names={"control": "cond", "prompt": "text"}
    )
    rows = list(found.rows())
    assert [len(row["edit"]) for row in rows] == [2, 1]
    assert [row.error for row in found.rejected] == ["MissingValue"]  # an empty list of images
    seeds = [[1, 2], [3]]
    for row, edits, control in zip(rows, seeds, (6, 7), strict=True):
        assert [storage.read_bytes(resolve_file(str(tmp_path), place)) for place in row["edit"]] == [
            png(seed) for seed in edits
        ]
        assert storage.read_bytes(resolve_file(str(tmp_path), row["control"])) == png(control)
    put(tmp_path / "folder", {"metadata.jsonl": jsonl([{**HF_ROWS[0], "mask_file_name": "m.png"}])})
    (row,) = read_metadata(str(tmp_path / "folder"), file_columns=("image", "mask")).rows()
    assert (row["image"], row["mask"]) == ("0.png", "m.png")


def test_a_parquet_row_group_is_read_once_and_no_more_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"train.parquet": shard(*range(8), rows_per_group=4)})
    rows = list(read_metadata(str(tmp_path)).rows())
    read: list[int] = []
    real = parquet_member.pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, **options: Any) -> Any:
        read.append(group)
        assert options["columns"] == ["image.bytes"]
        return real(self, group, **options)

    monkeypatch.setattr(parquet_member.pq.ParquetFile, "read_row_group", counted)
    for seed, row in enumerate(rows):
        assert storage.read_bytes(resolve_file(str(tmp_path), row["image"])) == png(seed)
    assert read == [0, 1]
    # Another file under the name is another version: nothing of the old one is given.
    put(tmp_path, {"train.parquet": shard(*range(10, 18), rows_per_group=4)})
    assert storage.read_bytes(resolve_file(str(tmp_path), rows[0]["image"])) == png(10)
    monkeypatch.setattr(parquet_member, "MAX_GROUP_BYTES", 100)
    put(tmp_path, {"train.parquet": shard(*range(8))})
    with pytest.raises(storage.MemberError, match="write the file with smaller row groups"):
        storage.read_bytes(resolve_file(str(tmp_path), rows[0]["image"]))


def bad_zips() -> dict[str, tuple[bytes, str]]:
    whole = zip_of(wds(0))
    lies = bytearray(zip_of({"0.png": b"\0" * 5000, "0.txt": b"x"}))
    at = lies.index(b"PK\x01\x02") + 24
    lies[at : at + 4] = (1 << 29).to_bytes(4, "little")
    huge = bytearray(lies)
    huge[at : at + 4] = (3 << 30).to_bytes(4, "little")
    secret = bytearray(whole)
    secret[secret.index(b"PK\x01\x02") + 8] |= 1
    return {
        "a claim that deflate cannot keep": (bytes(lies), "claims to hold 536870912 bytes in"),
        "a bomb": (bytes(huge), "more than the 1 GiB that are inflated"),
        "encrypted": (bytes(secret), "is encrypted; write it without a password"),
        "another compression": (zip_of(wds(0), zipfile.ZIP_LZMA), "is compressed by LZMA"),
        "cut short": (whole[: len(whole) // 2], "is not a readable zip"),
        "no zip": (b"<html>" + b"x" * 100, "is a web page"),
    }


@pytest.mark.parametrize("case", bad_zips())
def test_hostile_and_damaged_zips_are_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    data, words = bad_zips()[case]
    put(tmp_path, {"a.zip": data})
    try:
        said = " ".join(row.message for row in read_metadata(str(tmp_path)).rejected)
    except DatasetError as error:
        said = str(error)
    assert words in said
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"a.zip"}


def test_names_in_archives_lead_nowhere(tmp_path: Path) -> None:
    put(tmp_path, {"secret.txt": "secret"})
    names = ["../../secret.png", "/etc/passwd.png", "b.tar/@0+5/x.png", "c\\d.png"]
    for kind, write in {"zip": zip_of, "tar": tar_of}.items():
        folder = tmp_path / kind
        members: dict[str, bytes] = {}
        for seed, name in enumerate(names):
            members |= {name: png(seed), name.replace(".png", ".txt"): b"caption"}
        put(folder, {f"a.{kind}": write(members)})
        found = read_metadata(str(folder))
        assert len(found.table) == len(names) and not found.rejected
        read = {storage.read_bytes(resolve_file(str(folder), row["image"])) for row in found.rows()}
        assert read == {png(seed) for seed in range(len(names))}
        assert {path.name for path in folder.iterdir()} == {f"a.{kind}"}


def test_a_parquet_file_that_claims_too_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = hf_parquet({"image": ["a.png"] * 200_000, "text": ["x"] * 200_000}, rows_per_group=200_000)
    put(tmp_path, {"metadata.parquet": table})
    monkeypatch.setattr(parquet_rows, "FEWEST_ROWS_IN_DOUBT", 10)
    with pytest.raises(DatasetError, match="claims 200000 rows in .* damaged or hostile"):
        read_metadata(str(tmp_path))


def test_a_parquet_file_whose_columns_are_compressed_beyond_belief(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = pa.BufferOutputStream()
    table = pa.table({"image": ["a.png"], "text": ["a" * 5_000_000]})
    pq.write_table(table, out, compression="zstd", use_dictionary=False, write_statistics=False)
    put(tmp_path, {"metadata.parquet": out.getvalue().to_pybytes()})
    assert len(read_metadata(str(tmp_path)).table) == 1
    monkeypatch.setattr(parquet_rows, "FEWEST_BYTES_IN_DOUBT", 1000)
    with pytest.raises(DatasetError, match="would become 0.0 GiB, .* times its size; it is damaged or hostile"):
        read_metadata(str(tmp_path))


def test_an_archive_that_changed_under_the_run_is_told_as_such(tmp_path: Path) -> None:
    put(tmp_path, {"a.zip": zip_of(wds(0, 1))})
    (first, *_) = read_metadata(str(tmp_path)).rows()
    path = resolve_file(str(tmp_path), first["image"])
    for data, words in [
        (b"x" * 20_000, "no member begins at"),
        (zip_of(wds(0), zipfile.ZIP_LZMA), "is compressed by method 14"),
        (zip_of({"0.png": png(0)[:-1]}), "does not have|damaged|claims"),
        (zip_of({"0.png": png(0)})[:100], "it ends within the member at 0: cut short"),
    ]:
        put(tmp_path, {"a.zip": data})
        with pytest.raises(MediaError, match=words):
            fetch(path)


CUT = {
    "zip": (zip_of(wds(0, 1)), "it ends within the member at"),
    "tar": (tar_of(wds(0, 1)), "it ends within the member at"),
    "parquet": (shard(0, 1), "cannot be read from"),
}


@pytest.mark.parametrize("base", ["local", "memory"])
@pytest.mark.parametrize("kept", [0.4, 0.0])
@pytest.mark.parametrize("kind", CUT)
def test_an_archive_that_is_cut_short_is_its_rows_fault_and_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kept: float, base: str
) -> None:
    """No failure of the store, which would be tried again and end the run."""
    folder = str(tmp_path) if base == "local" else f"memory://cut/{kind}{kept}"
    whole, words = CUT[kind]
    storage.write_bytes_atomic(archive := f"{folder}/train.{kind}", whole)
    *_, last = read_metadata(folder).rows()
    path = resolve_file(folder, last["image"])
    assert fetch(path)
    storage.write_bytes_atomic(archive, whole[: int(len(whole) * kept)])
    monkeypatch.setattr(media.time, "sleep", lambda seconds: pytest.fail("it was tried again"))
    with pytest.raises(MediaError, match=words) as caught:
        fetch(path, storage.stamp(path))
    assert type(caught.value) is MediaError


def test_damaged_pages_of_a_parquet_file_are_its_rows_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bytearray(CUT["parquet"][0])
    put(tmp_path, {"train.parquet": bytes(whole)})
    *_, last = read_metadata(str(tmp_path)).rows()
    whole[4:1000] = b"\xff" * 996
    put(tmp_path, {"train.parquet": bytes(whole)})
    monkeypatch.setattr(media.time, "sleep", lambda seconds: pytest.fail("it was tried again"))
    with pytest.raises(MediaError, match=r"cannot be read from .*train\.parquet"):
        fetch(resolve_file(str(tmp_path), last["image"]))


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        (
            {"metadata.csv": "photo,caption\na,b\n"},
            {},
            r"no column 'image'; its columns are photo, caption; name the one that you have by --image_column NAME",
        ),
        (
            {"metadata.csv": "image,caption\na,b\n"},
            {},
            r"no column 'prompt'; its columns are image, caption; .*--caption_column NAME",
        ),
        (
            {"metadata.csv": "image,prompt\na,b\n"},
            {"file_columns": ("image", "control"), "required": ("image", "prompt", "control")},
            r"no column 'control'.*by --column_map '\{\"control\": \"NAME\"\}'",
        ),
        (
            {"metadata.csv": "image,prompt\na,b\n"},
            {"column_names": {"prompt": "prmpt"}},
            r"no column 'prmpt', which --caption_column names; its columns are image, prompt; did you mean prompt",
        ),
        ({SHARDS.format(0): b"x"}, {"split": "test"}, "has no split 'test'; its splits are train; .*--dataset_split"),
        (
            {"data/test-0-of-1.parquet": b"x", "data/dev.parquet": b"x"},
            {},
            "splits test, validation|splits validation, test",
        ),
        ({"a.png": png(0)}, {"split": "train"}, "has no split 'train'; leave --dataset_split out"),
        ({"a.jsonl": "{}"}, {"metadata_path": "a.jsonl,b.jsonl"}, r"there is no file b\.jsonl"),
        ({"a.jsonl": "{}"}, {"metadata_path": "{000..001}.tar"}, r"there is no file 000\.tar"),
        ({"a.jsonl": "{}"}, {"metadata_path": "{009..001}.tar"}, "goes down"),
        ({"a.jsonl": "{}"}, {"metadata_path": "{0..99999999}.tar"}, "more than 1000000 files"),
        ({"a.exe": "{}", "b.exe": "{}"}, {"metadata_path": "*.exe"}, "supported are .csv"),
        ({}, {"metadata_path": "C:\\data\\m.csv"}, "is a path of Windows: write it as this system knows it"),
        ({"a.jsonl": "{}"}, {"metadata_path": "a.jsonl", "split": "train"}, "leave one of them out"),
    ],
)
def test_errors_name_the_thing_the_reason_and_the_fix(
    tmp_path: Path, files: dict[str, bytes | str], options: dict[str, Any], words: str
) -> None:
    put(tmp_path, files)
    with pytest.raises(DatasetError, match=words):
        read_metadata(str(tmp_path), **options)


def test_paths_of_windows_and_urls_of_files(tmp_path: Path) -> None:
    for place in ("C:\\data", "D:/data/set", "data\\set"):
        with pytest.raises(DatasetError, match="is a path of Windows"):
            read_metadata(storage.absolute(place))
    folder = put(tmp_path / "a b", {"metadata.jsonl": jsonl([{"image": "0 0.png", "prompt": "x"}]), "0 0.png": png(0)})
    for base in (folder.as_uri(), f"file://{folder}", f"file://localhost{folder}"):
        (row,) = read_metadata(storage.absolute(base)).rows()
        assert storage.read_bytes(resolve_file(base, row["image"])) == png(0)
    for name in ((folder / "0 0.png").as_uri(), f"file://{folder}/0 0.png"):
        assert storage.read_bytes(resolve_file("/elsewhere", name)) == png(0)
    put(folder, {"1%200.png": png(1)})  # a name that has the three characters
    assert storage.read_bytes(resolve_file("/elsewhere", f"file://{folder}/1%200.png")) == png(1)


def test_rows_of_several_files_are_numbered_by_file(tmp_path: Path) -> None:
    put(tmp_path, {"a.csv": "image,prompt\n,x\n0.png,y\n0.png,y\n", "b.jsonl": '{"prompt": "x"}\n{"image": "0.png"}\n'})
    found = read_metadata(str(tmp_path), "a.csv,b.jsonl")
    assert [row.sample_id for row in found.rejected] == ["a.csv#row-1", "0.png#a.csv#row-3", "b.jsonl#row-1", "0.png#2"]


def test_a_metadata_path_means_the_same_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = put(tmp_path / "data", {"in.jsonl": "", "x/1.tsv": "", "s/00.tar": "", "a,b.csv": ""})
    put(tmp_path / "here", {"own.jsonl": "", "t/00.tar": ""})
    monkeypatch.chdir(tmp_path / "here")
    for given, whole in {
        "in.jsonl": "in.jsonl",
        "own.jsonl": f"{tmp_path}/here/own.jsonl",
        "own.jsonl,in.jsonl": f"{tmp_path}/here/own.jsonl,in.jsonl",
        "a,b.csv": "a,b.csv",
        "x/*.tsv": "x/*.tsv",
        "s/{00..01}.tar,t/{00..01}.tar": f"s/{{00..01}}.tar,{tmp_path}/here/t/{{00..01}}.tar",
        "absent.csv": "absent.csv",
    }.items():
        assert metadata_path_from_root(str(data), given) == whole


def test_patterns() -> None:
    assert split_list("a,{b,c}.tar, d") == ["a", "{b,c}.tar", "d"]
    assert expand_braces("s/{08..11}-{a,b}.tar")[:3] == ["s/08-a.tar", "s/08-b.tar", "s/09-a.tar"]
    assert len(expand_braces("s/{08..11}-{a,b}.tar")) == 8 and expand_braces("plain") == ["plain"]


def a_memory_store(files: dict[str, bytes | str]) -> str:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, content in files.items():
        memory.pipe_file(f"/layouts/{name}", content.encode() if isinstance(content, str) else content)
    return "memory://layouts"


@pytest.mark.parametrize("layout", ["imagefolder of a split", "parquet shards", "zip", "tars by braces"])
def test_behind_a_url(layout: str) -> None:
    import fsspec

    files, options, expected = LAYOUTS[layout]
    base = a_memory_store(files)
    try:
        rows = list(read_metadata(base, **options).rows())
        assert [(row["sample_id"], row["prompt"]) for row in rows] == [(name, text) for name, text, _ in expected]
        for row, (_, _, seed) in zip(rows, expected, strict=True):
            assert storage.read_bytes(resolve_file(base, row["image"])) == png(seed)
        if layout == "tars by braces":
            for pattern in (f"{base}/shards/*.tar", f"{base}/shards/{{000000..000002}}.tar"):
                assert len(read_metadata(base, pattern).table) == len(read_metadata(pattern).table) == 3
    finally:
        fsspec.filesystem("memory").rm("/layouts", recursive=True)
