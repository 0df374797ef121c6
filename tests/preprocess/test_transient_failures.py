"""Failures that are tried again by the next run, and those of files that are remembered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth import storage
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.data import media
from ray_diffsynth.data.media import StoreFailure
from ray_diffsynth.errors import UserError
from ray_diffsynth.preprocess import decode
from ray_diffsynth.preprocess import scan as scan_module
from tests.preprocess.conftest import InlineRay, Stage1
from tests.preprocess.counting import build_model, calls


def quarantine(cache: Path) -> dict[str, tuple[str, str | None]]:
    rows = Manifest.load(str(cache)).read_quarantine(str(cache)).to_pylist()
    return {row["sample_id"]: (row["error"], row["key"]) for row in rows}


def test_a_file_that_changes_while_the_job_runs_is_tried_again(
    tmp_path: Path, data: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    real = decode.load_inputs
    old = (data / "0003.png").read_bytes()

    def load(*arguments: Any, **options: Any) -> Any:
        Image.new("RGB", (64, 64), "teal").save(data / "0003.png")
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(decode, "load_inputs", load)
        report = inline(model, data, cache)
    assert report["samples"] == 11 and quarantine(cache) == {"0003.png": ("SourceChanged", None)}
    # Neither content is poisoned: the new one is encoded, and so is the old one when it comes back.
    report = inline(model, data, cache)
    assert (report["samples"], report["parameters"]["input_latents"]) == (12, {"encoded": 1, "reused": 11})
    (data / "0003.png").write_bytes(old)
    report = inline(model, data, cache)
    assert (report["samples"], report["parameters"]["input_latents"]) == (12, {"encoded": 1, "reused": 11})
    assert len(calls(model, "vae")) == 13 == len(set(calls(model, "vae")))


@pytest.mark.parametrize("stopped", [False, True], ids=["committed", "stopped by its limit"])
def test_a_file_that_changes_under_the_same_stamp_is_read_again(
    tmp_path: Path, data: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """A storage whose times are coarse: what the scan remembers of the file must not be believed by every later run."""
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    monkeypatch.setattr(storage, "stamp", lambda path: "the same")
    real = decode.load_inputs

    def load(*arguments: Any, **options: Any) -> Any:
        Image.new("RGB", (64, 64), "teal").save(data / "0003.png")
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(decode, "load_inputs", load)
        if stopped:
            with pytest.raises(UserError, match=r"1 x SourceChanged"):
                inline(model, data, cache, max_quarantine=0)
        else:
            assert inline(model, data, cache)["samples"] == 11
    read: list[str] = []
    scan_file = scan_module.scan_file
    monkeypatch.setattr(scan_module, "scan_file", lambda path, **how: read.append(path) or scan_file(path, **how))
    report = inline(model, data, cache)
    assert (report["samples"], report["quarantined"], report["parameters"]["input_latents"]["encoded"]) == (12, 0, 1)
    assert [Path(path).name for path in read] == ["0003.png"], "the other files are still known"


class ClientError(Exception):
    """As the clients of object stores raise: no OSError."""


@pytest.mark.parametrize(
    ("error", "asked"),
    [(OSError("503 SlowDown"), 5), (TimeoutError("read timeout"), 5), (ClientError("400"), 5), (PermissionError(), 1)],
    ids=lambda value: type(value).__name__,
)
def test_a_storage_that_cannot_be_asked_removes_no_sample(
    tmp_path: Path,
    data: Path,
    inline: Stage1,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    asked: int,
) -> None:
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    monkeypatch.setattr(media, "PAUSE_SECONDS", 0.0)
    real = storage.stamp
    failing: list[str] = []

    def stamp(path: str) -> str:
        if path.endswith("0003.png"):
            failing.append(path)
            raise error
        return real(path)

    # Never scanned before: what may not be read is tried again by the next run; a store that fails ends this one.
    with monkeypatch.context() as patched:
        patched.setattr(storage, "stamp", stamp)
        if isinstance(error, PermissionError):
            assert inline(model, data, cache)["samples"] == 11
            assert quarantine(cache) == {"0003.png": ("SourceUnavailable", None)}
        else:
            with pytest.raises(StoreFailure, match=rf"0003\.png cannot be read now \(tried {asked} times"):
                inline(model, data, cache)
    assert len(failing) == asked
    read: list[str] = []
    with monkeypatch.context() as patched:
        scan_file = scan_module.scan_file
        patched.setattr(scan_module, "scan_file", lambda path, **how: read.append(path) or scan_file(path, **how))
        assert inline(model, data, cache)["samples"] == 12
    assert "0000.png" not in {Path(path).name for path in read}, "what was scanned before the failure is known"
    index = Manifest.load(str(cache)).read_index(str(cache))
    # Scanned before: it stays as it was, and it is told.
    caplog.clear()
    with monkeypatch.context() as patched:
        patched.setattr(storage, "stamp", stamp)
        report = inline(model, data, cache)
    assert (report["samples"], report["parameters"]["input_latents"]) == (12, {"encoded": 0, "reused": 12})
    assert Manifest.load(str(cache)).read_index(str(cache)).equals(index) and len(failing) == 2 * asked
    told = [record.getMessage() for record in caplog.records if "cannot be asked" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("1 files are taken as they were") and "0003.png" in told[0]
    # It was never taken for changed: nothing is read again when the storage answers.
    assert inline(model, data, cache)["parameters"]["input_latents"]["reused"] == 12
    # An absent file is another matter.
    (data / "0003.png").unlink()
    assert inline(model, data, cache)["samples"] == 11 and quarantine(cache) == {"0003.png": ("MediaError", None)}


def test_a_file_that_changed_is_not_taken_as_it_was(
    tmp_path: Path, data: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stamp is another one, and only its bytes cannot be read: what was known of it is of the past."""
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    inline(model, data, cache)
    monkeypatch.setattr(media, "PAUSE_SECONDS", 0.0)
    Image.new("RGB", (64, 64), "teal").save(data / "0003.png")
    real = storage.read_bytes

    def read(path: str) -> bytes:
        if path.endswith("0003.png"):
            raise OSError("503 SlowDown")
        return real(path)

    with monkeypatch.context() as patched, pytest.raises(StoreFailure, match="503 SlowDown"):
        patched.setattr(storage, "read_bytes", read)
        inline(model, data, cache)
    assert quarantine(cache) == {} and inline(model, data, cache)["samples"] == 12


def test_a_storage_that_fails_while_decoding_is_tried_again(
    tmp_path: Path, data: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    monkeypatch.setattr(media, "PAUSE_SECONDS", 0.0)
    real, seen = storage.read_bytes, 0

    def read(path: str) -> bytes:
        nonlocal seen
        seen += path.endswith("0003.png")
        if path.endswith("0003.png") and seen > 1:  # the scan has read it
            raise OSError("503 SlowDown")
        return real(path)

    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"0003\.png cannot be read now \(tried 5"):
        patched.setattr(storage, "read_bytes", read)
        inline(model, data, cache)
    assert seen == 1 + media.READ_ATTEMPTS and not (cache / "manifest.json").exists()
    assert inline(model, data, cache)["samples"] == 12 and quarantine(cache) == {}


def test_a_machine_that_lacks_a_package_ends_the_run_at_once(
    tmp_path: Path, data: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the scan's task is on a machine other than the driver's, whose error Ray wraps."""
    from ray.exceptions import RayTaskError

    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"

    def stamp(path: str) -> str:
        raise storage.StorageError(f"{path} cannot be reached: pip install 'ray-diffsynth[s3]'")

    monkeypatch.setattr(storage, "stamp", stamp)
    with pytest.raises(storage.StorageError, match="pip install"):
        inline(model, data, cache)

    class RemoteRay(InlineRay):
        @staticmethod
        def remote(**_: Any) -> Callable[..., Any]:
            return lambda function: SimpleNamespace(remote=lambda *arguments: (function, arguments))

        @staticmethod
        def get(value: Any) -> Any:
            function, arguments = value
            try:
                return function(*arguments)
            except storage.StorageError as error:
                raise RayTaskError("scan", "a traceback", error) from None

    monkeypatch.setattr(scan_module, "ray", RemoteRay)
    with pytest.raises(storage.StorageError, match="pip install"):
        inline(model, data, cache)
    assert not (cache / "manifest.json").exists()


def test_an_image_whose_pixels_are_damaged_is_remembered(tmp_path: Path, data: Path, inline: Stage1) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(data / "0003.png")
    (data / "0003.png").write_bytes((data / "0003.png").read_bytes()[:3000])
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    inline(model, data, cache)
    ((error, key),) = [quarantine(cache)["0003.png"]]
    assert error == "MediaError" and key


def test_a_scan_task_that_dies_names_the_file(
    tmp_path: Path, data: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import WorkerCrashedError

    asked: list[int] = []

    class DyingRay(InlineRay):
        @staticmethod
        def remote(**_: Any) -> Callable[..., Any]:
            return lambda function: SimpleNamespace(remote=lambda *arguments: (function, arguments))

        @staticmethod
        def get(value: Any) -> Any:
            function, (scan, paths, *others) = value
            asked.append(len(paths))
            if any(path.endswith("0003.png") for path in paths):
                raise WorkerCrashedError
            return function(scan, paths, *others)

    monkeypatch.setattr(scan_module, "ray", DyingRay)
    report = inline(build_model(tmp_path / "model"), data, tmp_path / "cache")
    assert asked == [12] + [1] * 12 and report["samples"] == 11
    assert quarantine(tmp_path / "cache")["0003.png"][0] == "ScannerDied"
