"""Of a dataset's files each is read, or counted and named; files of unusual form are read or refused with the cause."""

from __future__ import annotations

import codecs
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ray_diffsynth.data.media import MediaError, fetch, load_image, reading
from ray_diffsynth.data.metadata import DatasetError, Metadata, read_metadata, resolve_file
from ray_diffsynth.data.suffixes import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES
from ray_diffsynth.data.text import TextError, decode_text
from ray_diffsynth.data.warnings import collecting

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 253806278\n"


def image(path: Path, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(path, **options)
    return path


def read(folder: Path, name: str | None = None) -> tuple[Metadata, dict[str, list[tuple[str, str]]]]:
    """The metadata, and the warnings by kind."""
    with collecting() as warned:
        found = read_metadata(str(folder), name)
    kinds: dict[str, list[tuple[str, str]]] = {}
    for warning in warned:
        kinds.setdefault(warning.kind, []).append((warning.sample_id, warning.detail))
    return found, kinds


def ids(metadata: Metadata) -> list[str]:
    return [*metadata.table["sample_id"].to_pylist(), *(row.sample_id for row in metadata.rejected)]


def test_linked_folders_are_read_once_and_without_an_end(tmp_path: Path) -> None:
    root = tmp_path / "data"
    image(root / "own" / "a.png")
    image(tmp_path / "store" / "b.png")
    image(tmp_path / "store" / "deep" / "c.png")
    image(root / ".kept" / "d.png")
    (root / "linked").symlink_to(tmp_path / "store")
    (root / "z_again").symlink_to(tmp_path / "store")
    (root / "own" / "up").symlink_to(root)
    (root / "above").symlink_to(tmp_path)
    (root / "same").symlink_to(root / "own")
    (root / "kept").symlink_to(root / ".kept")
    (root / "one.png").symlink_to(tmp_path / "store" / "b.png")
    (tmp_path / "store" / "round").symlink_to(tmp_path / "store")
    (root / "nowhere").symlink_to(tmp_path / "absent")
    found, _ = read(root)
    assert ids(found) == ["kept/d.png", "linked/b.png", "linked/deep/c.png", "one.png", "own/a.png"]


def test_what_looks_like_an_image_or_has_a_caption_is_read_or_named(tmp_path: Path) -> None:
    image(tmp_path / "a.JPE", format="JPEG")
    image(tmp_path / "b.jfif", format="JPEG")
    image(tmp_path / "c.TIF")
    for name in ("d.CR2", "e.heic", "f.psb", "g.mp4", "h.strange", "sub/more.tar", "._a.jpg", "README.md", "i.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("a", "h", "d", "alone"):
        (tmp_path / f"{name}.txt").write_text("a caption")
    found, warned = read(tmp_path)
    assert ids(found) == ["a.JPE", "b.jfif", "c.TIF"] and found.table["prompt"].to_pylist() == ["a caption"]
    left_out = dict(warned["file_left_out"])
    assert list(left_out) == ["._a.jpg", "d.CR2", "e.heic", "f.psb", "g.mp4", "h.strange", "i.csv", "sub/more.tar"]
    assert "raw" in left_out["d.CR2"] and "PNG" in left_out["e.heic"] and "ending" in left_out["h.strange"]
    assert "hidden" in left_out["._a.jpg"] and "video" in left_out["g.mp4"]
    assert warned["caption_alone"] == [("alone.txt", "")]
    assert set(warned) == {"file_left_out", "caption_alone"}


def test_every_ending_is_one_that_pillow_opens() -> None:
    Image.init()
    known = {ending for ending, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    assert set(IMAGE_SUFFIXES) <= known and not set(IMAGE_SUFFIXES) & set(UNREADABLE_SUFFIXES)


def test_a_folder_of_nothing_but_unreadable_images_names_one(tmp_path: Path) -> None:
    (tmp_path / "a.NEF").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"has a\.NEF \(1 such files\), which is not read"):
        read_metadata(str(tmp_path))


def test_images_beside_tars_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.png": image(tmp_path / "loose.png").read_bytes(), "a.txt": b"one"})
    found, warned = read(tmp_path)
    assert ids(found) == ["s.tar/a.png"] and [name for name, _ in warned["file_left_out"]] == ["loose.png"]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_a_tars_own_metadata_are_no_samples(tmp_path: Path) -> None:
    png = image(tmp_path / "x" / "p.png").read_bytes()
    members = {"__meta__/index.json": b'{"shards": 3}', "__info__": b"{", "__dataset__.json": b'{"author": "a"}'}
    members |= {"a.png": png, "a.txt": b"one", "__b__.png": png, "__b__.txt": b"two", "c.nef": b"x"}
    write_tar(tmp_path / "s.tar", members)
    found, warned = read(tmp_path)
    assert ids(found) == ["s.tar/a.png", "s.tar/__b__.png"] and not found.rejected
    assert found.table.column_names == ["sample_id", "image", "prompt"]
    assert [name for name, _ in warned["file_left_out"]] == ["s.tar/c.nef"]


def written(metadata: Metadata) -> list[dict[str, object]]:
    return [{"image": row["image"], "prompt": row["prompt"]} for row in metadata.rows()]


ROWS = [{"image": "0.png", "prompt": "a tile, green"}, {"image": "1.png", "prompt": "another; ä"}]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('image;prompt\n0.png;a tile, green\n1.png;"another; ä"\n', "semicolons"),
        ("image\tprompt\n0.png\ta tile, green\n1.png\tanother; ä\n", "tabs"),
        ("image|prompt\r\n0.png|a tile, green\r\n1.png|another; ä\r\n", "bars"),
        ('sep=;\nimage;prompt\n0.png;a tile, green\n1.png;"another; ä"\n', None),
        ('image,prompt\n0.png,"a tile, green"\n\ufeff1.png,another; ä\n', None),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_csv_of_another_form_is_read_and_named(tmp_path: Path, text: str, word: str | None, encoding: str) -> None:
    (tmp_path / "m.csv").write_bytes(text.encode(encoding))
    found, warned = read(tmp_path, "m.csv")
    assert written(found) == ROWS and not found.rejected
    details = " ".join(detail for _, detail in warned.get("file_form", []))
    assert (word or "") in details and ("UTF-" in details) == (encoding in ("utf-16", "utf-32"))
    assert bool(details) == (word is not None or encoding in ("utf-16", "utf-32"))


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_json_and_tsv_with_a_mark(tmp_path: Path, mark: bytes) -> None:
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    (tmp_path / "m.jsonl").write_bytes(mark + lines[0] + b"\n" + codecs.BOM_UTF8 + lines[1])
    (tmp_path / "m.json").write_bytes(mark + b"[" + b",".join(lines) + b"]")
    (tmp_path / "m.tsv").write_bytes(mark + "image\tprompt\n0.png\ta tile, green\n1.png\tanother; ä\n".encode())
    for name in ("m.jsonl", "m.json", "m.tsv"):
        found, warned = read(tmp_path, name)
        assert written(found) == ROWS and not warned


def test_an_unclear_separator_and_other_texts_are_refused_with_the_cause(tmp_path: Path) -> None:
    for text, words in {
        b"image;prompt,long\n0.png;a,b\n": "semicolons: separate the columns by commas",
        "image,prompt\n0.png,a\n".encode("utf-16-le"): "UTF-16 without a byte order mark.*save it as UTF-8",
        b"image,prompt\n0.png,\xe4\n": r"not UTF-8 \(line 2, byte 19\); save it as UTF-8",
        codecs.BOM_UTF16_LE + b"a": "not whole UTF-16",
        POINTER: "Git LFS pointer.*git lfs pull",
    }.items():
        (tmp_path / "m.csv").write_bytes(text)
        with pytest.raises(DatasetError, match=words):
            read_metadata(str(tmp_path), "m.csv")
    (tmp_path / "m.parquet").write_bytes(POINTER)
    with pytest.raises(DatasetError, match="Git LFS pointer"):
        read_metadata(str(tmp_path), "m.parquet")
    assert decode_text("x", b"one\0two") == "one\0two"  # a NUL alone is a character
    with pytest.raises(TextError, match="Git LFS"):
        decode_text("x", POINTER)


def test_pointers_of_git_lfs_are_named_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(POINTER)
    image(tmp_path / "q.png")
    (tmp_path / "q.txt").write_bytes(POINTER)
    found, _ = read(tmp_path)
    (rejected,) = [row for row in found.rejected if row.error == "MalformedRow"]
    assert rejected.source.endswith("q.png") and "q.txt is a Git LFS pointer" in rejected.message
    for read_it in (fetch, load_image):
        with pytest.raises(MediaError, match="Git LFS pointer.*git lfs pull"):
            read_it(str(tmp_path / "p.png"))
    with pytest.raises(MediaError, match="Git LFS pointer"), reading(str(tmp_path / "p.png")):
        pass
    (tmp_path / "s.tar").write_bytes(POINTER)
    with pytest.raises(DatasetError, match=r"s\.tar is a Git LFS pointer"):
        read_metadata(str(tmp_path), "s.tar")


def test_paths_of_windows(tmp_path: Path) -> None:
    place = image(tmp_path / "sub" / "a.png")
    assert resolve_file(str(tmp_path), "sub\\a.png") == str(place)
    assert resolve_file(str(tmp_path), ".\\sub\\a.png") == f"{tmp_path}/./sub/a.png"
    odd = image(tmp_path / "b\\c.png")
    assert resolve_file(str(tmp_path), "b\\c.png") == str(odd)
    for name in ("C:\\data\\a.png", "C:/data/a.png", "sub\\absent.png"):
        with pytest.raises(MediaError, match="no such file; it is a path of Windows: write it with /"):
            fetch(resolve_file(str(tmp_path), name))
    with pytest.raises(MediaError, match="no such file$"):
        fetch(resolve_file(str(tmp_path), "sub/absent.png"))


def test_tables_that_are_not_read_are_named(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "a.json").write_text("{}")  # about one image, as downloaders write it
    (tmp_path / "METADATA.CSV").write_text("image,prompt\na.png,x\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "metadata.json").write_text("[]")
    (tmp_path / "sub" / "captions.jsonl").write_text("{}")
    _, kinds = read(tmp_path)
    assert {name for name, _ in kinds["file_left_out"]} == {"METADATA.CSV", "sub/captions.jsonl", "sub/metadata.json"}
    assert all("--dataset_metadata_path" in detail for _, detail in kinds["file_left_out"])
