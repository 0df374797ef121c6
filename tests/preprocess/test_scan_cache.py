"""What is remembered of source files: the last that was found of each, in few parts, and nothing that is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_diffsynth.data.scan import SourceFile
from ray_diffsynth.preprocess import scan_cache as module
from ray_diffsynth.preprocess.scan_cache import BEFORE_PARTS, SCAN_CACHE, ScanCache, forget


def source(path: str, stamp: str = "1-2", digest: str = "abc") -> SourceFile:
    return SourceFile(path, stamp, 64, 32, digest, num_frames=3, fps=12.5, decode_bytes=2**40, note="ü")


def scan(cache: Path, *files: SourceFile, asked: str = "") -> None:
    """A scan that asks for some paths and finds these files."""
    scan_cache = ScanCache(str(cache))
    known = scan_cache.known([*(file.path for file in files), *asked])
    scan_cache.add({file.path: file for file in files}, known)
    scan_cache.finish()


def parts(cache: Path) -> list[Path]:
    return sorted((cache / SCAN_CACHE).glob("*"))


def test_it_keeps_what_can_be_trusted(tmp_path: Path) -> None:
    scan_cache = ScanCache(str(tmp_path))
    scan_cache.add({"a": source("a"), "b": source("b", stamp=""), "c": "not there"}, {})
    scan_cache.save()
    assert ScanCache(str(tmp_path)).known(["a", "b", "c"]) == {"a": source("a")}
    assert ScanCache(str(tmp_path)).known(["b"]) == {}
    (part,) = parts(tmp_path)
    whole = part.read_bytes()
    for damaged in (whole.replace(b"version", b"VERSION"), whole[:-5], b"", b"[]", b"\0" * 100):
        part.write_bytes(damaged)
        assert ScanCache(str(tmp_path)).known(["a"]) == {}
    part.unlink()
    silent = ScanCache(str(tmp_path), remember=False)
    silent.add({"a": source("a")}, {})
    silent.finish()
    assert not parts(tmp_path)


def test_the_last_of_a_path_counts_and_a_file_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    scan(tmp_path, source("a"), source("b"))
    scan(tmp_path, source("a", "3-4", "new"), asked="b")
    assert ScanCache(str(tmp_path)).known("ab") == {"a": source("a", "3-4", "new"), "b": source("b")}
    scan_cache = ScanCache(str(tmp_path))
    scan_cache.add({"a": "not there", "c": "not there"}, scan_cache.known("abc"))
    scan_cache.finish()
    assert ScanCache(str(tmp_path)).known("abc") == {"b": source("b")}


def test_an_unchanged_scan_writes_nothing(tmp_path: Path) -> None:
    scan(tmp_path, *map(source, "abc"))
    before = [(part, part.stat()) for part in parts(tmp_path)]
    scan(tmp_path, *map(source, "abc"))
    assert before and [(part, part.stat()) for part in parts(tmp_path)] == before


def test_only_what_is_new_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_FILES", 2)
    scan(tmp_path, *map(source, "abcd"))
    before = {part: part.stat() for part in parts(tmp_path)}
    scan(tmp_path, source("e"), asked="abcd")
    after = {part: part.stat() for part in parts(tmp_path)}
    assert len(after) == len(before) + 1 and before.items() <= after.items()


def test_many_small_parts_become_one_and_what_is_of_no_use_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMALL_PARTS", 4)
    names = "abcdefgh"
    for number, name in enumerate(names):
        scan(tmp_path, source(name), asked=names[:number])
        assert len(parts(tmp_path)) <= 6
    assert ScanCache(str(tmp_path)).known(names) == {name: source(name) for name in names}
    (tmp_path / BEFORE_PARTS).write_text("{}")
    scan(tmp_path, source("x"))  # another dataset: nothing asks for the others any more
    scan(tmp_path, source("x"))
    assert ScanCache(str(tmp_path)).known([*names, "x"]) == {"x": source("x")}
    assert len(parts(tmp_path)) == 1 and not (tmp_path / BEFORE_PARTS).exists()


def test_what_is_forgotten_is_read_again(tmp_path: Path) -> None:
    cache = str(tmp_path)
    forget(cache, ["a"])
    assert not (tmp_path / SCAN_CACHE).exists()
    scan(tmp_path, *map(source, "abc"))
    forget(cache, ["b", "x"])
    assert ScanCache(cache).known(["a", "b", "c"]) == {"a": source("a"), "c": source("c")}
    before = [(part, part.stat()) for part in parts(tmp_path)]
    forget(cache, ["b", "x"])  # nothing to do: the files stay
    assert [(part, part.stat()) for part in parts(tmp_path)] == before
