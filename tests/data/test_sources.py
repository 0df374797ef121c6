"""Files that change or cannot be read while a job runs: told apart from files that are bad."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from ray_diffsynth import storage
from ray_diffsynth.data import media
from ray_diffsynth.data.buckets import Bucket, SizeRule
from ray_diffsynth.data.media import (
    READ_ATTEMPTS,
    MediaError,
    SourceChanged,
    SourceUnavailable,
    StoreFailure,
    bytes_hash,
    content_hash,
)
from ray_diffsynth.data.samples import digests_of, load_inputs, pixel_keys
from ray_diffsynth.data.scan import scan_file
from ray_diffsynth.data.sources import verified_bytes, verified_file
from ray_diffsynth.data.spec import SampleSpec
from tests.video_files import draw_clip


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "PAUSE_SECONDS", 0.0)


def image(path: Path, colour: str) -> str:
    Image.new("RGB", (64, 64), colour).save(path)
    return str(path)


def flaky(monkeypatch: pytest.MonkeyPatch, failures: int, error: Exception) -> list[str]:
    """storage.read_bytes fails so often; returns the paths that were asked for."""
    asked: list[str] = []
    real = storage.read_bytes

    def read(path: str) -> bytes:
        asked.append(path)
        if len(asked) <= failures:
            raise error
        return real(path)

    monkeypatch.setattr(storage, "read_bytes", read)
    return asked


def test_a_storage_that_recovers_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image(tmp_path / "a.png", "red")
    asked = flaky(monkeypatch, READ_ATTEMPTS - 1, OSError("503 SlowDown"))
    assert scan_file(path).width == 64 and len(asked) == READ_ATTEMPTS


class ClientError(Exception):
    """As the clients of object stores raise them."""


@pytest.mark.parametrize(
    ("error", "kind", "tries"),
    [(ClientError("503"), StoreFailure, READ_ATTEMPTS), (PermissionError("403"), SourceUnavailable, 1)],
)
def test_a_storage_that_does_not_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], tries: int
) -> None:
    path = image(tmp_path / "a.png", "red")
    asked = flaky(monkeypatch, 99, error)
    with pytest.raises(kind, match="503|403") as caught:
        media.load_image(path)
    assert len(asked) == tries
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes from a task
    assert str(again) == str(caught.value) and type(again) is kind
    if kind is StoreFailure:
        assert "a.png cannot be read now (tried 5 times; ClientError: 503)" in str(again)
        assert "run the same command" in str(again)


def test_a_name_that_no_file_can_have_is_the_rows_fault(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name in ("a" * 300, "loop.png"):
        with pytest.raises(MediaError, match="no such file"):
            scan_file(str(tmp_path / name))


def test_damage_is_the_files_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image(path, "red")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(MediaError) as caught:
        media.load_image(str(path))
    assert type(caught.value) is MediaError


def test_a_file_read_in_parts_fails_as_its_storage_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_clip(tmp_path / "a.mp4", 5)

    class Broken:
        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *_: object) -> None: ...

        def size(self) -> int:
            return 1

        def read(self, size: int = -1) -> bytes:
            raise ClientError("connection reset")

        seek = tell = read

    monkeypatch.setattr(storage, "open_input", lambda path: Broken())
    for read in (content_hash, scan_file):
        with pytest.raises(StoreFailure, match="connection reset"):
            read(str(tmp_path / "a.mp4"))


def test_what_was_replaced_is_not_taken_for_what_was_scanned(tmp_path: Path) -> None:
    path = image(tmp_path / "a.bmp", "red")
    digest = scan_file(path).digest
    assert bytes_hash(verified_bytes(path, digest)) == digest
    before = os.stat(path)
    image(tmp_path / "a.bmp", "blue")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    with pytest.raises(SourceChanged, match="changed while the job ran"):
        verified_bytes(path, digest)
    os.remove(path)
    with pytest.raises(SourceChanged, match="no such file"):
        verified_bytes(path, digest)


def test_every_file_of_a_row_is_compared(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        image(tmp_path / name, "red")
    spec = SampleSpec(str(tmp_path), {"input_image": "image", "edit": "edit"}, ("input_image", "edit"), SizeRule())
    row: dict[str, Any] = {"image": "a.png", "edit": ["b.png", "c.png"]}
    files = {param: [scan_file(path) for path in spec.paths(row, param)] for param in spec.file_params}
    keys = pixel_keys(row, files, Bucket(64, 64), spec)
    digests = {param: digests_of(value) for param, value in keys.items()}
    assert digests == {param: [file.digest for file in found] for param, found in files.items()}
    assert len(load_inputs(row, Bucket(64, 64), spec, digests=digests)["edit"]) == 2
    image(tmp_path / "c.png", "blue")
    with pytest.raises(SourceChanged, match=r"c\.png"):
        load_inputs(row, Bucket(64, 64), spec, digests=digests)


def test_a_video_is_compared_before_and_after(tmp_path: Path) -> None:
    draw_clip(tmp_path / "a.mp4", 5)
    path = str(tmp_path / "a.mp4")
    digest = content_hash(path)
    spec = SampleSpec(str(tmp_path), {"input_image": "image"}, ("input_image",), SizeRule())
    load_inputs({"image": "a.mp4"}, Bucket(48, 64), spec, digests={"input_image": [digest]})
    with pytest.raises(SourceChanged), verified_file(path, digest) as place:
        assert place == path, "a local file is read where it is"
        Path(path).write_bytes(b"something else")
        raise MediaError(place, "damaged or truncated")
    with pytest.raises(SourceChanged), verified_file(path, digest):
        raise AssertionError("it is another file by now")


def test_a_remote_video_is_fetched_once(tmp_path: Path) -> None:
    draw_clip(tmp_path / "a.mp4", 5)
    data = (tmp_path / "a.mp4").read_bytes()
    fsspec.filesystem("memory").pipe_file("/sources/a.mp4", data)
    with verified_file("memory://sources/a.mp4", bytes_hash(data)) as place:
        assert Path(place).read_bytes() == data and place.endswith(".mp4")
    with pytest.raises(MediaError, match=r"^memory://sources/a\.mp4: damaged"):  # noqa: SIM117
        with verified_file("memory://sources/a.mp4", bytes_hash(data)) as place:
            raise MediaError(place, "damaged")
    assert not Path(place).exists()


def test_bytes_and_file_have_one_hash(tmp_path: Path) -> None:
    path = image(tmp_path / "a.png", "red")
    copy = io.BytesIO()
    assert content_hash(path, copy) == bytes_hash(copy.getvalue()) == bytes_hash(Path(path).read_bytes())
    assert np.asarray(media.load_image(path, copy.getvalue())).shape == (64, 64, 3)
