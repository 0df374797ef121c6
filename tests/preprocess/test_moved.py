"""Moved data is the same data; what is another dataset is told with counts, and goes on when it is asked to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.preprocess import same_dataset
from tests.data.dataset_files import hf_parquet, tar_of, zip_of
from tests.preprocess.conftest import Stage1
from tests.preprocess.counting import build_model, calls


def rows_of(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "metadata.csv").read_text().splitlines()[1:]
    return [(name, caption) for name, _, caption in (line.partition(",") for line in lines)]


def write_rows(folder: Path, rows: list[tuple[str, str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.csv").write_text("image,prompt\n" + "".join(f"{name},{text}\n" for name, text in rows))
    return folder


def absolute(few: Path, place: Path) -> Path:
    return write_rows(place, [(str(few / name), text) for name, text in rows_of(few)])


def below(few: Path, place: Path) -> Path:
    shutil.copytree(few, place / "images")
    return write_rows(place, [(f"images/{name}", text) for name, text in rows_of(few)])


def renamed(few: Path, place: Path) -> Path:
    place.mkdir()
    for name, _ in rows_of(few):
        shutil.copy(few / name, place / f"new_{name}")
    return write_rows(place, [(f"new_{name}", text) for name, text in rows_of(few)])


def members(few: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, text in rows_of(few):
        found |= {name: (few / name).read_bytes(), name.replace(".png", ".txt"): text.encode()}
    return found


def in_a_tar(few: Path, place: Path) -> Path:
    place.mkdir()
    (place / "moved.tar").write_bytes(tar_of(members(few)))
    return place / "moved.tar"


def in_a_zip(few: Path, place: Path) -> Path:
    place.mkdir()
    (place / "packed.zip").write_bytes(zip_of(members(few)))
    return place


def in_parquet(few: Path, place: Path) -> Path:
    cells = [{"bytes": (few / name).read_bytes(), "path": name} for name, _ in rows_of(few)]
    table = hf_parquet({"image": cells, "text": [text for _, text in rows_of(few)]}, rows_per_group=5)
    (place / "data").mkdir(parents=True)
    (place / "data" / "train-00000-of-00001.parquet").write_bytes(table)
    return place


MOVES: dict[str, Callable[[Path, Path], Path]] = {
    "absolute paths": absolute,
    "a sub-folder": below,
    "other names": renamed,
    "a tar": in_a_tar,
    "a zip": in_a_zip,
    "a file of datasets": in_parquet,
}


@pytest.mark.parametrize("move", MOVES)
def test_moved_data_goes_on_without_encoding(tmp_path: Path, few: Path, inline: Stage1, move: str) -> None:
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    inline(model, few, cache)
    count = len(calls(model))
    report = inline(model, MOVES[move](few, tmp_path / "moved"), cache)
    assert (report["samples"], report["quarantined"]) == (12, 0) and len(calls(model)) == count


def other(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 200, 9)).save(folder / f"other{number}.png")
    return write_rows(folder, [(f"other{number}.png", "caption number 1") for number in range(3)])


@pytest.mark.parametrize("dry", [True, False])
def test_another_dataset_is_told_with_counts_and_replaces_when_it_is_asked_to(
    tmp_path: Path, few: Path, inline: Stage1, dry: bool
) -> None:
    model, cache, data = build_model(tmp_path / "model"), tmp_path / "cache", other(tmp_path / "other")
    inline(model, few, cache)
    # The captions are those of the cache: that makes no dataset the same.
    words = (
        r"another dataset \(12 samples, such as 0000.png, none of which is in this one of 3 rows, such as other0.png; "
    )
    words += r"of 3 whose files were looked at, none .*--replace_dataset"
    options: dict[str, Any] = {"dry_run": dry}
    with pytest.raises(CacheError, match=words):
        inline(model, data, cache, **options)
    assert Manifest.load(str(cache)).counts["samples"] == 12
    report = inline(model, data, cache, replace_dataset=True)
    assert report["samples"] == 3 and report["parameters"]["prompt_embeds"]["encoded"] == 0


def test_few_files_are_looked_at(tmp_path: Path, few: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_dataset, "LOOKED_AT", 2)
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    inline(model, few, cache)
    with pytest.raises(CacheError, match="of 2 whose files were looked at, none"):
        inline(model, other(tmp_path / "other"), cache)
    moved = renamed(few, tmp_path / "moved")
    assert inline(model, moved, cache)["samples"] == 12
