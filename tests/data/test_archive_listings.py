"""What is kept of archives: they are not opened again while they are the same, and give the same rows and warnings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth import storage
from ray_diffsynth.data.archives import tars as tars_module
from ray_diffsynth.data.archives.listings import Listing, Listings, kept_listings
from ray_diffsynth.data.metadata import Metadata, read_metadata, resolve_file
from ray_diffsynth.data.warnings import collecting
from tests.data.dataset_files import png, tar_of

MEMBERS = {
    "0.png": png(0),
    "0.txt": "héllo".encode(),
    "1.png": png(1),
    "1.json": json.dumps({"prompt": "two"}).encode(),
    "2.heic": b"left out, with a warning",
    "sub/3.png": png(3),
    "sub/3.txt": b"\xff\xfe\x00\xd8 no text",
    "__meta__.json": b"{}",
}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Archives that are opened."""
    found: list[str] = []
    real = tars_module.opened_archive

    def spy(path: str, kind: str) -> Any:
        found.append(os.path.basename(path))
        return real(path, kind)

    monkeypatch.setattr(tars_module, "opened_archive", spy)
    return found


def read(base: str, folder: str, *, save: bool = True) -> tuple[Metadata, list[tuple[str, str, str]]]:
    with collecting() as warnings, kept_listings(folder) as kept:
        found = read_metadata(base)
        if save:
            kept.save()
    return found, [(warning.kind, warning.sample_id, warning.detail) for warning in warnings]


@pytest.mark.parametrize("base", ["local", "memory"])
def test_an_archive_is_opened_once_while_it_is_the_same(tmp_path: Path, opened: list[str], base: str) -> None:
    base = str(tmp_path / "data") if base == "local" else "memory://listings/data"
    folder = str(tmp_path / "kept")
    for name in ("a", "b"):
        storage.write_bytes_atomic(f"{base}/{name}.tar", tar_of(MEMBERS))
    first, warned = read(base, folder, save=False)
    assert sorted(opened) == ["a.tar", "b.tar"] and not os.path.exists(folder)
    read(base, folder)
    opened.clear()
    again, told = read(base, folder)
    assert opened == [] and again.table.equals(first.table) and again.rejected == first.rejected
    assert sorted(told) == sorted(warned) and any("2.heic" in sample for _, sample, _ in told)
    assert len(again.table) == 4 and len(again.rejected) == 2
    for row in again.rows():
        assert storage.read_bytes(resolve_file(base, row["image"])) in MEMBERS.values()
    # One that changed is opened, and what was kept of it goes.
    storage.write_bytes_atomic(f"{base}/b.tar", tar_of({"9.png": png(9), "9.txt": b"nine"}))
    changed, _ = read(base, folder)
    assert opened == ["b.tar"] and changed.table["sample_id"].to_pylist()[-1] == "b.tar/9.png"
    assert len(os.listdir(folder)) == 2
    opened.clear()
    storage.remove(f"{base}/b.tar")
    read(base, folder)
    assert opened == [] and len(os.listdir(folder)) == 1


def test_what_is_damaged_is_not_used(tmp_path: Path, opened: list[str]) -> None:
    base, folder = tmp_path / "data", tmp_path / "kept"
    storage.write_bytes_atomic(str(base / "a.tar"), tar_of(MEMBERS))
    first, _ = read(str(base), str(folder))
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    for content in (b"", whole[:-9], b"x" * 100):
        kept.write_bytes(content)
        opened.clear()
        assert read(str(base), str(folder))[0].table.equals(first.table) and opened == ["a.tar"]
        assert kept.read_bytes() == whole


def test_an_archive_that_is_cut_short_or_has_no_version_is_not_kept(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = tmp_path / "data", tmp_path / "kept"
    storage.write_bytes_atomic(str(base / "a.tar"), tar_of(MEMBERS)[:8000])
    assert len(read(str(base), str(folder))[0].rejected) > 1
    storage.write_bytes_atomic(str(base / "a.tar"), tar_of(MEMBERS))
    monkeypatch.setattr(storage, "stamp", lambda path: "")
    read(str(base), str(folder))
    assert not folder.exists() and opened == ["a.tar"] * 2


def test_names_that_are_no_text_are_not_kept(tmp_path: Path) -> None:
    kept = Listings(str(tmp_path / "kept"), str(tmp_path))
    kept.put("a.tar", "1", Listing(["\udcff.png"], [512], [1], [None]))
    assert os.listdir(tmp_path) == []
