"""WebDataset tars: members of one stem are one sample, read from their place."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth import storage
from ray_diffsynth.data.media import content_hash, load_image, probe_image
from ray_diffsynth.data.metadata import DatasetError, read_metadata, resolve_file


def image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    first = {"000.png": image(0), "000.txt": b"a caption\n", "001.png": image(1), "001.json": b'{"prompt": "two"}'}
    first |= {"sub/002.png": image(2), "sub/002.txt": b"in a folder", "003.txt": b"no image", "004.png": image(4)}
    write_tar(tmp_path / "a-000.tar", first)
    second = {"000.png": image(5), "000.txt": b"again", "000.control.png": image(6), "001.png": image(7)}
    write_tar(tmp_path / "a-001.tar", {**second, "001.json": b"[1]"})
    return tmp_path


def test_rows_ids_and_pixels(tars: Path) -> None:
    found = read_metadata(str(tars), file_columns=("image", "control"))
    rows = list(found.rows())
    assert [(row["sample_id"], row["prompt"]) for row in rows] == [
        ("a-000.tar/000.png", "a caption"),
        ("a-000.tar/001.png", "two"),
        ("a-000.tar/sub/002.png", "in a folder"),
        ("a-001.tar/000.png", "again"),
    ]
    assert {row.sample_id: row.error for row in found.rejected} == {
        "row-4": "MissingValue",
        "a-000.tar/004.png": "MissingValue",
        "row-7": "MalformedRow",
    }
    for row, seed in zip(rows, (0, 1, 2, 5), strict=True):
        path = resolve_file(str(tars), row["image"])
        (tars / "plain.png").write_bytes(image(seed))
        plain = str(tars / "plain.png")
        assert storage.read_bytes(path) == image(seed) and storage.file_size(path) == len(image(seed))
        assert probe_image(path) == (48, 32) and content_hash(path) == content_hash(plain)
        assert load_image(path).tobytes() == load_image(plain).tobytes()
    control = resolve_file(str(tars), rows[3]["control"])
    assert storage.read_bytes(control) == image(6)


def test_one_tar_by_name_and_the_stamp_is_that_of_the_tar(tars: Path) -> None:
    rows = list(read_metadata(str(tars), "a-001.tar", required=("image",)).rows())
    assert [row["sample_id"] for row in rows] == ["a-001.tar/000.png"]
    path = resolve_file(str(tars), rows[0]["image"])
    assert storage.stamp(path).startswith(storage.stamp(str(tars / "a-001.tar")))
    outside = list(read_metadata(str(tars / "a-001.tar")).rows())
    assert storage.read_bytes(resolve_file("/elsewhere", outside[0]["image"])) == image(5)


def test_a_tar_that_is_cut_short_gives_what_it_has_and_says_so(tars: Path) -> None:
    path = tars / "a-000.tar"
    path.write_bytes(path.read_bytes()[: 512 * 3 + len(image(0)) // 512 * 512 + 512 * 4])
    found = read_metadata(str(tars))
    assert "a-000.tar/000.png" in found.table["sample_id"].to_pylist()
    assert any("a-000.tar cannot be read to its end (unexpected end of data)" in row.message for row in found.rejected)
    assert found.total == len(found.table) + len(found.rejected)


def test_what_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(DatasetError, match=r"no readable row.*x\.tar cannot be read"):
        read_metadata(str(tmp_path))
    write_tar(tmp_path / "x.tar", {"README": b"nothing"})
    with pytest.raises(DatasetError, match="hold no samples|no readable row"):
        read_metadata(str(tmp_path))


def test_a_metadata_file_may_name_members(tars: Path) -> None:
    place = list(read_metadata(str(tars)).rows())[1]["image"]
    (tars / "metadata.jsonl").write_text(json.dumps({"image": place, "prompt": "named"}) + "\n")
    (row,) = read_metadata(str(tars)).rows()
    assert row["sample_id"] == "a-000.tar/001.png"
