"""The commit: all or nothing at each write, nothing by whoever lost the cache, and little where little changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ray_diffsynth import storage
from ray_diffsynth.cache import cuts
from ray_diffsynth.cache import lease as lease_module
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.lease import lease
from ray_diffsynth.cache.manifest import Manifest
from tests.cache.indexes import commit_ids, index_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "WINDOW", 8)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """File -> bytes that were written."""
    found: dict[str, int] = {}
    real = storage.write_bytes_atomic

    def counted(path: str, data: Any, **options: Any) -> None:
        found["/".join(Path(path).parts[-2:])] = memoryview(data).nbytes
        real(path, data, **options)

    monkeypatch.setattr(storage, "write_bytes_atomic", counted)
    yield found


def files(cache: Path) -> dict[str, bytes]:
    paths = [path for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(cache)): path.read_bytes() for path in paths}


def test_the_parts_are_the_table(tmp_path: Path, small_parts: None) -> None:
    cache = str(tmp_path)
    captions = [f"caption {n}" if n % 5 else None for n in range(300)]
    manifest = commit_ids(cache, range(300), range(40), captions=captions)
    assert len(manifest.index_parts) > 10 and len(manifest.quarantine_parts) > 1
    assert sum(part.rows for part in manifest.index_parts) == 300
    assert Manifest.load(cache) == manifest and manifest.read_index(cache).equals(index_of(range(300)))
    assert manifest.read_captions(cache) == captions and manifest.read_quarantine(cache).num_rows == 40
    for part in manifest.index_parts:
        assert pq.read_metadata(tmp_path / part.file).num_rows == part.rows
    assert {file for file in files(tmp_path) if file != "manifest.json"} == set(manifest.tables())


def test_identity_does_not_depend_on_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for number, (window, version) in enumerate([(2048, 4), (8, 4), (20, 4), (8, 3)]):
        monkeypatch.setattr(cuts, "WINDOW", window)
        cache = str(tmp_path / str(number))
        manifest = commit_ids(cache, range(300), version=version)
        found.add(manifest.identity(manifest.read_index(cache)))
    assert len(found) == 1 and len(manifest.index_parts) == 1


def test_what_is_there_is_not_written_again(tmp_path: Path, small_parts: None, written: dict[str, int]) -> None:
    cache = str(tmp_path)
    first = commit_ids(cache, range(600), [1000])
    written.clear()
    assert commit_ids(cache, range(600), [1000]) == first and len(written) == 1
    for ids in (range(601), [n for n in range(601) if n != 300], [n for n in range(601) if n not in (0, 300)]):
        written.clear()
        before = set(files(tmp_path))
        manifest = commit_ids(cache, ids, [1000])
        new = set(manifest.tables()) - before
        assert 1 <= len(new) <= 3 and set(written) == {*new, f"{tmp_path.name}/manifest.json"}
        assert manifest.read_index(cache).equals(index_of(ids))
    # Of an interrupted commit nobody knows whether it is whole.
    part = Path(cache, manifest.index_parts[0].file)
    Path(cache, "manifest.json").unlink()
    part.write_bytes(b"half")
    assert commit_ids(cache, ids, [1000]) == manifest and manifest.read_index(cache).num_rows == len(ids)
    # One that somebody removed is written although the manifest names it.
    part.unlink()
    assert commit_ids(cache, ids, [1000]) == manifest and manifest.read_index(cache).num_rows == len(ids)


def test_a_new_sample_costs_little(tmp_path: Path, written: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a million rows, at a tenth of the size; benchmarks/claim_13_commit.py has the whole."""
    monkeypatch.setattr(cuts, "WINDOW", cuts.WINDOW // 10)
    cache, rows = str(tmp_path), 100_000
    captions = [f"a picture with the number {n} on a wall, seen from the left in the evening" for n in range(rows)]
    commit_ids(cache, range(rows), captions=captions)
    index = sum(size for file, size in written.items() if file.startswith("index/"))
    for number in (rows, rows + 1):  # at the end of the first bucket, then of the second
        written.clear()
        captions.insert(rows // 2, "new") if number == rows else captions.append("new")
        commit_ids(cache, range(number + 1), captions=captions)
        assert sum(written.values()) <= 0.02 * index


def test_a_cache_in_one_file_becomes_parts(tmp_path: Path, small_parts: None) -> None:
    cache = str(tmp_path)
    older = commit_ids(cache, range(300), range(40), version=3)
    assert len(files(tmp_path)) == 3 and commit_ids(cache, range(300), range(40), version=3) == older
    newer = commit_ids(cache, range(300), range(40))
    assert newer.version == 4 and len(newer.index_parts) > 10 and newer.read_index(cache).equals(index_of(range(300)))
    assert {file for file in files(tmp_path) if file != "manifest.json"} == set(newer.tables())


def test_a_write_that_fails_leaves_the_cache_as_it_was(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path)
    first = commit_ids(cache, range(300), range(20))
    write = storage.write_bytes_atomic
    done = False
    for at in range(99):
        left = at

        def fail(path: str, data: Any, **options: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError("the disk is full")
            write(path, data, **options)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes_atomic", fail)
            try:
                second = commit_ids(cache, range(50, 320), range(21))
                done = True
                break
            except OSError:
                pass
        assert Manifest.load(cache) == first and first.read_index(cache).equals(index_of(range(300)))
        assert first.read_quarantine(cache).num_rows == 20
    assert done and at > 4 and {file for file in files(tmp_path) if "json" not in file} == set(second.tables())


KILLED = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from ray_diffsynth.cache import cuts
from ray_diffsynth.cache.manifest import Manifest
from tests.cache.indexes import commit_ids, index_of
from tests.cache.test_commit import files

cuts.WINDOW = 8
root = Path(sys.argv[1])
old, new = (range(300), range(20)), ([n for n in range(320) if n not in (17, 150)], range(22))

def in_a_process(act, *arguments):
    if (child := os.fork()) == 0:
        try:
            act(*arguments)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def killed_at(cache, at, moment):
    count = itertools.count()
    def patched(real):
        def call(*arguments):
            if (now := next(count)) == at and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)
            if now == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return call
    for name in ("replace", "remove"):
        setattr(os, name, patched(getattr(os, name)))
    commit_ids(str(cache), *new)

def check(cache):
    found = Manifest.load(str(cache))
    there = new if found.counts["samples"] == len(new[0]) else old
    assert found.read_index(str(cache)).equals(index_of(there[0]))
    assert found.read_quarantine(str(cache)).num_rows == len(there[1])
    print("new" if there is new else "old", flush=True)
    commit_ids(str(cache), *new)
    assert files(cache) == files(root / "new"), sorted(files(cache).keys() ^ files(root / "new").keys())

assert in_a_process(commit_ids, str(root / "old"), *old) == 0
assert in_a_process(commit_ids, str(root / "new"), *new) == 0
for at in itertools.count():
    for moment in ("before", "after"):
        cache = root / f"{moment}-{at}"
        shutil.copytree(root / "old", cache)
        ended = in_a_process(killed_at, cache, at, moment)
        if ended == 0:
            sys.exit(0)
        assert ended == -signal.SIGKILL, ended
        assert in_a_process(check, cache) == 0, (moment, at)
"""


def test_a_kill_at_any_write_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Before and after each rename and each removal; the next commit gives the files of an undisturbed one."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    shown = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert shown.returncode == 0, shown.stderr
    found = shown.stdout.split()
    changed = len(files(tmp_path / "new").keys() - files(tmp_path / "old").keys())
    gone = len(files(tmp_path / "old").keys() - files(tmp_path / "new").keys())
    assert changed > 3 and gone > 2
    assert found.count("old") == 2 * changed + 1 and found.count("new") == 1 + 2 * gone


SUSPENDED = """
import itertools, os, signal, sys
from ray_diffsynth.cache.lease import lease
from tests.cache.indexes import commit_ids

calls = itertools.count()
with lease(sys.argv[1]) as held:
    def check():
        if next(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGSTOP)
        held.check()
    commit_ids(sys.argv[1], range(50), check=check)
"""


@pytest.mark.parametrize("at", [0, 1], ids=["before the manifest", "before a removal"])
def test_a_suspended_holder_commits_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    cache = str(tmp_path)
    commit_ids(cache, range(40))
    for name, seconds in (("BEAT_SECONDS", 0.05), ("STALE_SECONDS", 0.5), ("SETTLE_SECONDS", 0.05)):
        monkeypatch.setattr(lease_module, name, seconds)
    holder = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, cache, str(at)], cwd=ROOT, text=True, stderr=subprocess.PIPE
    )
    try:
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
        assert Manifest.load(cache).counts["samples"] == (40 if at == 0 else 50)
        while True:
            try:
                with lease(cache) as mine:
                    # What was committed before it: its files are those that the suspended one was about to remove.
                    commit_ids(cache, range(40), [7], check=mine.check)
                break
            except CacheError as error:  # its last sign of life is too young
                assert f"process {holder.pid}" in str(error)
                time.sleep(0.1)
        before = files(tmp_path)
        os.kill(holder.pid, signal.SIGCONT)
        _, message = holder.communicate()
    finally:
        holder.kill()
        holder.wait()
    assert holder.returncode == 1 and "taken over by another attempt" in message
    manifest = Manifest.load(cache)
    assert manifest.read_index(cache).num_rows == 40 and manifest.read_quarantine(cache).num_rows == 1
    assert files(tmp_path) == before
    assert not [path for path in tmp_path.rglob("*") if storage.is_temporary(path.name)]
