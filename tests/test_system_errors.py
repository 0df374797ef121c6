"""Errors of the machine in one line: whatever library wraps them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError

from ray_diffsynth.report.document import write_text
from ray_diffsynth.storage import create_new, write_bytes_atomic
from ray_diffsynth.system_errors import explain, naming_file


def raised(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            raised(errno.ENOSPC, "/out/a"),
            "No space left on device: '/out/a'; check the rights and the free space there",
        ),
        (raised(errno.EFBIG), "raise the limit of a file's size"),
        (raised(errno.ENOTDIR, "/out/file/a"), "'/out/file/a'; give another path"),
        (raised(errno.ENAMETOOLONG), "give another path"),
        (raised(errno.EMFILE), "ulimit -n"),
        (raised(errno.ESTALE, "/nfs/a"), "the network drive fails"),
        (OutOfDiskError("Local disk is full\nmore"), "the disk of Ray's temporary folder is full"),
        (ObjectStoreFullError("full"), "Ray's object store is full"),
        (OutOfMemoryError("Task was killed\nmore"), "the machine's memory ran out"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "set TMPDIR to a folder"),
    ],
)
def test_one_line_with_the_fix(error: Exception, told: str) -> None:
    outer = RuntimeError("a worker failed")
    outer.__cause__ = error
    for each in (error, outer):
        said = explain(each)
        assert said is not None and told in said and "\n" not in said


def test_errors_of_the_program_are_none_of_the_machines() -> None:
    for error in (KeyError("a"), FileNotFoundError(2, "No such file or directory", "a"), RuntimeError("(os error)")):
        assert explain(error) is None
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert explain(one) is None


def test_what_libraries_raise_for_a_full_disk() -> None:
    """pyarrow an OSError with its number, safetensors an error of its own with the number in the text."""
    from safetensors.numpy import save_file

    with pytest.raises(OSError) as parquet, pq.ParquetWriter("/dev/full", pa.schema([("a", pa.int64())])) as writer:
        for _ in range(100):
            writer.write_table(pa.table({"a": np.arange(100_000)}))
    assert "check the rights and the free space" in str(explain(parquet.value))
    with pytest.raises(Exception) as weights:
        save_file({"a": np.zeros(4)}, "/proc/no_such_folder/a.safetensors")
    assert explain(weights.value) is None and "os error 2" in str(weights.value)
    error = type(weights.value)("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "check the rights and the free space" in str(explain(error))


def test_a_write_that_fails_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="No space left on device: 'a.bin'"), naming_file("a.bin"):
        raise raised(errno.ENOSPC)
    with pytest.raises(OSError, match="'b.bin'"), naming_file("a.bin"):
        raise raised(errno.ENOSPC, "b.bin")

    def full(handle: int) -> None:
        raise raised(errno.ENOSPC)

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: write_bytes_atomic(str(tmp_path / "x"), b"1"), lambda: write_text(str(tmp_path), "x", "1")):
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'x'}'"):
            write()
    assert list(tmp_path.iterdir()) == [] and create_new(str(tmp_path / "x"), b"1")


def test_a_report_of_a_path_that_is_no_utf8(tmp_path: Path) -> None:
    import json

    folder = os.fsdecode(b"\xff")
    write_text(str(tmp_path), "report.json", json.dumps({"folder": folder, "猫": "ü"}, ensure_ascii=False))
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == {"folder": folder, "猫": "ü"}
