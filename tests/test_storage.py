"""Files: atomic writes, listing, local paths and URLs alike."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from ray_diffsynth import storage
from ray_diffsynth.storage import spool as spool_module
from ray_diffsynth.storage.spool import Spool


@pytest.fixture(params=["local", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "a folder::ö")
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/prefix"


def test_write_read_list_remove(base: str) -> None:
    assert storage.list_files(base) == []
    for name in ("b.txt", "sub/a.TXT", "sub/c.png", ".hidden.txt", "sub/.x/d.txt"):
        storage.write_bytes_atomic(storage.join(base, name), name.encode())
    assert storage.list_files(base) == ["b.txt"]
    assert storage.list_files(base, suffix=".txt", recursive=True) == ["b.txt", "sub/a.TXT"]
    path = storage.join(base, "b.txt")
    assert storage.exists(path) and storage.read_bytes(path) == b"b.txt" and storage.file_size(path) == 5
    with storage.open_input(path) as file:
        file.seek(2)
        assert file.read(2) == b"tx" and file.size() == 5
    storage.write_bytes_atomic(path, b"new")
    assert storage.read_bytes(path) == b"new"
    assert storage.is_folder(storage.join(base, "sub")) and not storage.is_folder(path)
    assert storage.remove(path) and not storage.remove(path) and not storage.exists(path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "f")
    storage.write_bytes_atomic(path, b"old")

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", no_space)
        storage.write_bytes_atomic(path, b"new")
    assert os.listdir(tmp_path) == ["f"] and storage.read_bytes(path) == b"old"


def test_an_unfinished_write_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".x.parquet.tmp-12-0af3").write_bytes(b"half")
    assert storage.list_files(str(tmp_path)) == []
    assert storage.is_temporary(".x.parquet.tmp-12-0af3") and not storage.is_temporary("x.parquet")


def test_join_and_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert storage.join("s3://b/p", "x", "y.png") == "s3://b/p/x/y.png"
    assert storage.join("/data", "/abs/y.png") == "/abs/y.png"
    assert storage.join("/data", "https://h/y.png") == "https://h/y.png"
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("x") == str(tmp_path / "x")
    assert storage.absolute("s3://b/x") == "s3://b/x" and storage.is_remote("s3://b/x")
    assert not storage.is_remote("file:///x") and storage.absolute("file:///x") == "/x"


def test_create_new_writes_once(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = storage.join(base, "lease.json")
    assert storage.create_new(path, b"mine") and not storage.create_new(path, b"other")
    assert storage.read_bytes(path) == b"mine" and storage.list_files(base) == ["lease.json"]

    def no_links(*paths: str) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    second = storage.join(base, "second.json")
    assert storage.create_new(second, b"mine") and not storage.create_new(second, b"other")
    assert storage.read_bytes(second) == b"mine"


def test_folders_and_unfinished_writes(base: str) -> None:
    base = storage.join(base, "fresh")
    for name in ("a/x.txt", "b/c/y.txt", "z.txt", ".hidden/q.txt"):
        storage.write_bytes_atomic(storage.join(base, name), b"x")
    assert storage.list_folders(base) == ["a", "b"] and storage.list_folders(storage.join(base, "none")) == []
    if not storage.is_remote(base):
        Path(base, "a", ".x.txt.tmp-1-ab").write_bytes(b"half")
        assert storage.list_unfinished(storage.join(base, "a")) == [os.path.join(base, "a", ".x.txt.tmp-1-ab")]


def test_the_stamp_tells_a_replaced_file_of_the_same_size_and_time(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bmp")
    stamps = []
    for content in (b"one", b"two"):
        storage.write_bytes_atomic(path, content)
        os.utime(path, (1e9, 1e9))
        stamps.append(storage.stamp(path))
    assert stamps[0] != stamps[1] == storage.stamp(path)
    inside = storage.member_path(path.replace(".bmp", ".tar"), (1, 1), "x")
    storage.write_bytes_atomic(path.replace(".bmp", ".tar"), b"xyz")
    assert storage.stamp(inside).endswith("@1+1")


def test_a_store_without_versions_has_no_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/versions/a.tar", b"one")
    first = storage.stamp("memory://versions/a.tar")
    memory.pipe_file("/versions/a.tar", b"two")
    assert first and storage.stamp("memory://versions/a.tar") != first

    def untold(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(type(memory), "modified", untold)
    assert storage.stamp("memory://versions/a.tar") == ""
    assert storage.stamp(storage.member_path("memory://versions/a.tar", (0, 1), "x")) == ""


def test_file_sizes(base: str) -> None:
    base = storage.join(base, "sizes")
    assert storage.file_sizes(base) == {}
    for name in ("a.txt", "b.txt", "sub/c.txt", ".hidden"):
        storage.write_bytes_atomic(storage.join(base, name), name.encode())
    assert storage.file_sizes(base) == {"a.txt": 5, "b.txt": 5}


@pytest.mark.parametrize(("url", "extra"), [("gs://b/x", "gcs"), ("s3://b/x", "s3")])
def test_a_package_that_is_missing_is_named(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("Please install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(
        storage.StorageError, match=rf"{url} cannot be reached: .*pip install 'ray-diffsynth\[{extra}\]'"
    ):
        storage.exists(url)


def test_a_url_that_nothing_opens_is_named() -> None:
    with pytest.raises(
        storage.StorageError, match="foo://a/b cannot be reached: Protocol not known: foo; check the URL"
    ):
        storage.exists("foo://a/b")


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.ENOSYS, errno.EBADF])
@pytest.mark.parametrize("of", ["folder", "file", "both"])
def test_a_refused_fsync_fails_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int, of: str) -> None:
    def refuse(handle: int) -> None:
        if of == "both" or stat.S_ISDIR(os.fstat(handle).st_mode) == (of == "folder"):
            raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "fsync", refuse)
    path = tmp_path / "a" / "file"
    for content in (b"1", b"2"):
        storage.write_bytes_atomic(str(path), content)
        assert path.read_bytes() == content and os.listdir(path.parent) == ["file"]


def test_a_folder_that_cannot_be_opened_fails_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *args: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        storage.write_bytes_atomic(str(tmp_path / "file"), b"1")
    assert (tmp_path / "file").read_bytes() == b"1"


@pytest.mark.parametrize("failure", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failed_fsync_is_told_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int
) -> None:
    def fail(handle: int) -> None:
        raise OSError(failure, os.strerror(failure))

    (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="file"):
        storage.write_bytes_atomic(str(tmp_path / "file"), b"1")
    assert (tmp_path / "file").read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]


def test_unfinished_writes_of_this_process_are_told_from_those_that_had_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: seen.append(source))
        storage.write_bytes_atomic(str(tmp_path / "file"), b"1")
    assert storage.is_own_temporary(seen[0]) and storage.list_unfinished(str(tmp_path)) == seen
    assert not storage.is_own_temporary(f".file.tmp-{os.getpid()}-0af3") and not storage.is_own_temporary("file")


def test_a_folder_is_written_whole_moved_and_removed(base: str) -> None:
    folder = storage.join(base, "step-1")
    storage.write_folder_atomic(folder, {"tensors": b"1", "state": b"2"})
    storage.write_folder_atomic(folder, {"tensors": b"3", "state": b"4"})
    assert [storage.read_bytes(storage.join(folder, name)) for name in storage.list_files(folder)] == [b"4", b"3"]
    assert storage.list_folders(base) == ["step-1"]
    storage.move(folder, storage.join(base, "old"))
    assert storage.list_files(base, recursive=True) == ["old/state", "old/tensors"]
    storage.remove_folder(storage.join(base, "old"))
    assert storage.list_files(base, recursive=True) == []


def test_a_folder_that_is_not_written_to_its_end_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_folder_atomic(str(tmp_path / "step-1"), {"state": b"old"})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", fails_for_want_of_space)
        storage.write_folder_atomic(str(tmp_path / "step-1"), {"state": b"new"})
    assert storage.list_folders(str(tmp_path)) == ["step-1"]
    assert (tmp_path / "step-1" / "state").read_bytes() == b"old"
    storage.write_folder_atomic(str(tmp_path / "step-2"), {"state": b"next"})
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]


def fails_for_want_of_space(handle: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_spool_gives_back_its_batches_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = Spool(pa.schema([("n", pa.int64()), ("text", pa.string())]))
    batches = [
        pa.record_batch([pa.array(range(at, at + 3)), pa.array(["a", None, "x" * at])], schema=spool.schema)
        for at in range(5)
    ]
    assert [spool.append(batch) for batch in batches] == list(range(5)) and not list(tmp_path.iterdir())
    assert spool[3].equals(batches[3]) and spool[0].equals(batches[0]) and list(spool) == batches
    # Written while it is read, by a batch that is a slice of another.
    assert spool[spool.append(batches[2].slice(1, 1))].to_pylist() == [{"n": 3, "text": None}] and len(spool) == 6


def test_a_full_disk_is_told_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = Spool(pa.schema([("n", pa.int64())]))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spool_module.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        spool.append(pa.record_batch([pa.array([1])], schema=spool.schema))
    assert caught.value.filename == str(tmp_path)
