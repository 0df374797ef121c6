"""Copies of remote files on this machine: fetched once, again when changed, bounded in size."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import fsspec
import pytest

from ray_diffsynth.cache.local_copy import LocalCopies


@pytest.fixture
def remote() -> str:
    base = "memory://local-copy-test"
    fs = fsspec.filesystem("memory")
    for number in range(4):
        fs.pipe_file(f"/local-copy-test/{number}.parquet", bytes([number]) * 1000)
    return base


def held(copies: LocalCopies) -> int:
    return sum(path.stat().st_size for path in copies.folder.glob("*.copy"))


def test_each_file_is_fetched_once_and_again_when_it_changes(remote: str, tmp_path: Path) -> None:
    copies = LocalCopies(str(tmp_path), 10_000)
    for _ in range(3):
        with copies.open(f"{remote}/1.parquet") as file:
            assert file.read() == b"\x01" * 1000
    assert copies.fetched == 1
    assert LocalCopies(str(tmp_path), 10_000).open(f"{remote}/1.parquet").read(1) == b"\x01"
    fsspec.filesystem("memory").pipe_file("/local-copy-test/1.parquet", b"new")
    assert copies.open(f"{remote}/1.parquet").read() == b"new"
    assert copies.fetched == 2


def test_the_limit_holds_and_what_was_used_last_stays(remote: str, tmp_path: Path) -> None:
    copies = LocalCopies(str(tmp_path), 2500)
    first = copies.open(f"{remote}/0.parquet")
    for number in (1, 2, 3, 2, 3):
        copies.open(f"{remote}/{number}.parquet").close()
        assert held(copies) <= 2500
    assert first.read() == b"\x00" * 1000  # removed, yet open
    assert copies.fetched == 4
    copies.open(f"{remote}/0.parquet").close()
    assert copies.fetched == 5
    tiny = LocalCopies(str(tmp_path / "tiny"), 10)
    assert tiny.open(f"{remote}/0.parquet").read() == b"\x00" * 1000  # larger than the limit: still served


def test_threads_that_ask_at_once_fetch_once(remote: str, tmp_path: Path) -> None:
    copies = LocalCopies(str(tmp_path), 10_000)
    threads = [threading.Thread(target=lambda: copies.open(f"{remote}/2.parquet").close()) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert copies.fetched == 1


def test_local_files_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"here")
    copies = LocalCopies(str(tmp_path / "copies"), 100)
    assert copies.open(str(tmp_path / "file")).read() == b"here"
    assert copies.fetched == 0


def test_what_a_killed_fetch_left_is_removed_unless_it_is_being_written(remote: str, tmp_path: Path) -> None:
    LocalCopies(str(tmp_path), 10_000)
    left, written = (tmp_path / f".{name}.copy.tmp-1-ab" for name in ("0f" * 16, "1f" * 16))
    for path in (left, written):
        path.write_bytes(b"half")
    with open(tmp_path / ".locks" / "1f", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        LocalCopies(str(tmp_path), 10_000)
        assert not left.exists() and written.exists()
    LocalCopies(str(tmp_path), 10_000)
    assert not written.exists()
