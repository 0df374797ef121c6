"""Whose fault it is: a sample's own (quarantine), the run's (an error), or nobody's (the next run tries again)."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from ray_diffsynth import storage
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cache.store import shard_name
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data import media
from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.errors import UserError
from ray_diffsynth.pipelines.core.base import MissingModelError, PipelineError
from ray_diffsynth.pipelines.core.unit import MissingInputError
from ray_diffsynth.preprocess import decode, encode_batches, encoder, messages
from ray_diffsynth.preprocess import scan as scan_module
from ray_diffsynth.preprocess.datasink import ShardSink
from ray_diffsynth.preprocess.decode import Decoder
from ray_diffsynth.preprocess.encode_batches import DeviceError, encode
from ray_diffsynth.preprocess.encoder import Encoder
from ray_diffsynth.preprocess.job import Job
from ray_diffsynth.preprocess.messages import EncoderError, shard_row, unpack
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.shards import ShardPlan, Wanted
from ray_diffsynth.storage import StorageError
from tests.preprocess import counting
from tests.preprocess.conftest import InlineRay, Stage1
from tests.preprocess.counting import FAMILY, build_model, calls

Process = Callable[[Any, Any, list[dict[str, Any]]], list[dict[str, Any]]]


class Bench:
    """One shard of twelve pictures, decoded, and an encoder whose unit does what a test says."""

    def __init__(self, tmp_path: Path, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        config = PreprocessConfig(
            model=str(build_model(tmp_path / "model")), family=FAMILY, dataset_base_path=str(few), batch_size=4
        )
        job = Job.of(config)
        group = next(group for group in job.groups if group.name == "vae")
        self.spec = job.encoder(group, 4)
        size = Bucket(64, 64)
        rows = (Wanted(f"k{n}", f"{n:04d}.png", {"image": f"{n:04d}.png"}, size.name, size) for n in range(12))
        self.shard = shard_row(ShardPlan(shard_name(["k"]), size.name, tuple(rows)))

    def decode(self) -> dict[str, Any]:
        return Decoder(self.spec)(self.shard)

    def encode(self, process: Process) -> dict[str, Any]:
        shard = self.decode()
        self.patch.setattr(counting.PictureUnit, "process_batch", process)
        return Encoder(self.spec)(shard)

    def results(self, process: Process, count: int, batch_size: int) -> tuple[list[Any], int]:
        """What `encode` makes of samples that are the numbers 0, 1, 2 …"""
        self.patch.setattr(counting.PictureUnit, "process_batch", process)
        one = Encoder(self.spec)
        return encode(one.pipe, one.group, {}, [{"input_image": n} for n in range(count)], batch_size)


@pytest.fixture
def bench(tmp_path: Path, few: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, few, monkeypatch)


def numbers(batch: list[dict[str, Any]]) -> list[int]:
    return [inputs["input_image"] for inputs in batch]


def raising(error: Exception, at: int) -> Process:
    def process(self: Any, pipe: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if at in numbers(batch):
            raise error
        return [{"input_latents": torch.ones(1)} for _ in batch]

    return process


def always(error: Exception) -> Process:
    def process(self: Any, pipe: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        raise error

    return process


# ---------------------------------------------------------------- the sample's own


def test_an_error_of_the_users_kind_is_the_samples_own_too(bench: Bench) -> None:
    results, size = bench.results(raising(PipelineError("the prompt holds <|image_pad|>"), at=5), 8, 4)
    assert results[5] == Failure("PipelineError", "the prompt holds <|image_pad|>") and size == 4
    assert sum(isinstance(result, dict) for result in results) == 7


def test_a_unit_may_return_less_than_it_declares(bench: Bench) -> None:
    shard = bench.encode(lambda self, pipe, batch: [{} for _ in batch])
    assert not shard["given_up"] and shard["failed"] == "{}"
    assert [values for _, values in unpack(shard["inputs"])] == [{}] * 12


@pytest.mark.parametrize(
    "value",
    [
        [torch.tensor([float("nan")])],
        {"a": (1, torch.tensor(float("inf")))},
        [0.5, float("nan")],
        np.array([np.inf]),
        torch.full((2,), float("nan")).to(torch.float8_e4m3fn),
    ],
    ids=["tensor in a list", "tensor in a dict", "float in a list", "array", "float8"],
)
def test_numbers_that_are_not_finite_are_found_everywhere(bench: Bench, value: Any) -> None:
    def process(self: Any, pipe: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"input_latents": value if n == 1 else [torch.ones(1)]} for n in numbers(batch)]

    results, _ = bench.results(process, 3, 3)
    kinds = [result.error if isinstance(result, Failure) else "dict" for result in results]
    assert kinds == ["dict", "NonFiniteError", "dict"]


def test_eight_bit_floats_are_encoded(bench: Bench) -> None:
    results, _ = bench.results(
        lambda self, pipe, batch: [{"input_latents": torch.ones(2).to(torch.float8_e4m3fn)} for _ in batch], 2, 2
    )
    assert all(isinstance(result, dict) for result in results)


def test_one_look_at_the_device_for_a_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    real = encode_batches.all_finite
    monkeypatch.setattr(encode_batches, "all_finite", lambda values: looks.append(len(values)) or real(values))
    bench.results(lambda self, pipe, batch: [{"input_latents": [torch.ones(1)] * 3} for _ in batch], 8, 4)
    assert looks == [4, 4]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_kind_of_too_little_memory_halves_the_batch(bench: Bench, error: Exception) -> None:
    sizes: list[int] = []

    def process(self: Any, pipe: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sizes.append(len(batch))
        if len(batch) > 2 or 5 in numbers(batch):
            raise error
        return [{"input_latents": torch.ones(1)} for _ in batch]

    results, size = bench.results(process, 8, 8)
    assert [type(result) for result in results].count(Failure) == 1 and results[5].error == "OutOfMemoryError"
    assert size == 2 and sizes[:3] == [8, 4, 2]


def test_what_failed_keeps_no_tensors(bench: Bench) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def process(self: Any, pipe: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        gc.collect()
        alive.append(sum(ref() is not None for ref in kept))
        big = torch.zeros(1000)
        kept.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory") if len(kept) % 2 else ValueError("no")

    results, _ = bench.results(process, 6, 2)
    assert all(isinstance(result, Failure) for result in results) and set(alive) == {0}


# ---------------------------------------------------------------- the run's


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (lambda self, pipe, batch: [{"input_latents": {1}} for _ in batch], "input_latents.*builtins.set.*cannot be"),
        (lambda self, pipe, batch: [{"undeclared": 1} for _ in batch], "wrote 'undeclared' without declaring it"),
        (lambda self, pipe, batch: [], "got 4 samples and returned 0"),
        (always(MissingModelError("the model 'vae' is not loaded")), "'vae' is not loaded"),
        (always(MissingInputError("CaptionUnit needs 'prompt'")), "needs 'prompt'"),
    ],
    ids=["not to be stored", "undeclared", "too few", "no model", "no input"],
)
def test_the_runs_own_mistakes_end_it_with_their_text(bench: Bench, process: Process, message: str) -> None:
    told: list[str] = []
    shard = bench.decode()
    bench.patch.setattr(counting.PictureUnit, "process_batch", process)
    one = Encoder(bench.spec)
    one.monitor = SimpleNamespace(give_up=SimpleNamespace(remote=told.append))
    bench.patch.setattr(encoder, "attempt_at", lambda *_: nullcontext())
    bench.patch.setattr(messages, "ray", SimpleNamespace(get=lambda value: value))
    result = one(shard)
    assert result["given_up"] and len(told) == 1 and re.search(message, told[0])


def test_a_lost_device_ends_the_process(bench: Bench) -> None:
    ended: list[str] = []

    def end(monitor: Any, attempt: Any, words: str) -> None:
        ended.append(words)

    bench.patch.setattr(encoder, "end_this_process", end)
    with pytest.raises(DeviceError):
        bench.encode(always(RuntimeError("CUDA error: device-side assert triggered")))
    assert ended == ["RuntimeError: CUDA error: device-side assert triggered"]


def written(bench: Bench, tmp_path: Path, shard: dict[str, Any]) -> list[dict[str, Any]]:
    sink = ShardSink(str(tmp_path / "cache"), "vae", bench.spec.parameters, "none")
    return sink.write([pa.Table.from_pylist([shard])], None)


def test_a_full_disk_ends_the_run(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_bytes_atomic", full)
    shard = bench.encode(lambda self, pipe, batch: [{"input_latents": torch.ones(1)} for _ in batch])
    with pytest.raises(EncoderError, match=r"vae cannot be written to.*No space left on device"):
        written(bench, tmp_path, shard)


def test_what_the_machine_lacks_ends_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> Any:
        raise StorageError("s3://lab cannot be reached; install the extra s3")

    monkeypatch.setattr(decode, "load_inputs", lacking)
    with pytest.raises(EncoderError, match="install the extra s3"):
        bench.decode()


def test_an_encoder_that_cannot_load_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monitor = SimpleNamespace(
        begin_loading=SimpleNamespace(remote=lambda actor, node: [node] * 5),
        give_up=SimpleNamespace(remote=told.append),
    )
    context = SimpleNamespace(get_actor_id=lambda: "a", get_node_id=lambda: "n")
    monkeypatch.setattr(encoder, "living", lambda nodes: nodes)
    fake = SimpleNamespace(get=lambda value: value, get_runtime_context=lambda: context)
    monkeypatch.setattr(encoder, "ray", fake)
    with pytest.raises(EncoderError, match="died each time while it loaded its models"):
        Encoder(bench.spec, monitor)
    assert len(told) == 1 and "the encoder of vae cannot be loaded" in told[0]


# ---------------------------------------------------------------- nobody's


@pytest.fixture
def data(tmp_path: Path, few: Path) -> Path:
    return Path(shutil.copytree(few, tmp_path / "data"))


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
    [(OSError("503 SlowDown"), 3), (TimeoutError("read timeout"), 3), (ClientError("400"), 3), (PermissionError(), 1)],
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

    # Never scanned before: it cannot be encoded in this run, and is tried again by the next.
    with monkeypatch.context() as patched:
        patched.setattr(storage, "stamp", stamp)
        assert inline(model, data, cache)["samples"] == 11
    assert quarantine(cache) == {"0003.png": ("SourceUnavailable", None)} and len(failing) == asked
    assert inline(model, data, cache)["samples"] == 12
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

    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_bytes", read)
        assert inline(model, data, cache)["samples"] == 11
    assert quarantine(cache) == {"0003.png": ("SourceUnavailable", None)}
    assert inline(model, data, cache)["samples"] == 12


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

    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_bytes", read)
        inline(model, data, cache)
    assert seen == 4 and quarantine(cache) == {"0003.png": ("SourceUnavailable", None)}
    assert inline(model, data, cache)["samples"] == 12


def test_a_picture_whose_pixels_are_damaged_is_remembered(tmp_path: Path, data: Path, inline: Stage1) -> None:
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
            function, (paths, *others) = value
            asked.append(len(paths))
            if any(path.endswith("0003.png") for path in paths):
                raise WorkerCrashedError
            return function(paths, *others)

    monkeypatch.setattr(scan_module, "ray", DyingRay)
    report = inline(build_model(tmp_path / "model"), data, tmp_path / "cache")
    assert asked == [12] + [1] * 12 and report["samples"] == 11
    assert quarantine(tmp_path / "cache")["0003.png"][0] == "ScannerDied"


# ---------------------------------------------------------------- how much of it is too much


def test_too_much_quarantine_is_said_before_anything_is_encoded(tmp_path: Path, data: Path, inline: Stage1) -> None:
    for number in range(3):
        os.remove(data / f"{number:04d}.png")
    model = build_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"3 of 12 rows .* --max_quarantine 2 allows at most 2 \(3 x MediaError"):
        inline(model, data, tmp_path / "cache", max_quarantine=2)
    assert calls(model) == []


def test_too_much_quarantine_is_said_after_the_group(tmp_path: Path, data: Path, inline: Stage1) -> None:
    bad = counting.digest(np.asarray(Image.open(data / "0001.png").convert("RGB")))
    model = build_model(tmp_path / "model", too_big=[bad])
    with pytest.raises(UserError, match="1 of 12 rows .* allows at most 0"):
        inline(model, data, tmp_path / "cache", max_quarantine=0)
    assert len({line.split()[0] for line in calls(model)}) == 1, "the other group need not be encoded"


def test_repeated_rows_are_weight_not_quarantine(tmp_path: Path, data: Path, inline: Stage1) -> None:
    lines = (data / "metadata.csv").read_text().splitlines()
    (data / "metadata.csv").write_text("\n".join([*lines, lines[1], lines[2]]) + "\n")
    report = inline(build_model(tmp_path / "model"), data, tmp_path / "cache", max_quarantine=0)
    assert (report["samples"], report["quarantined"]) == (12, 2)


def test_reused_counts_what_was_there_whatever_else_failed(tmp_path: Path, data: Path, inline: Stage1) -> None:
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    inline(model, data, cache, pools={})
    Image.new("RGB", (64, 64), "teal").save(data / "0003.png")
    bad = counting.digest(np.asarray(Image.open(data / "0003.png")))
    counting.behave(model, too_big=[bad])
    (data / "metadata.csv").write_text((data / "metadata.csv").read_text().replace("number 5", "number five"))
    report = inline(model, data, cache, pools={})
    assert report["parameters"]["prompt_embeds"] == {"encoded": 1, "reused": 12}
    assert report["parameters"]["input_latents"] == {"encoded": 0, "reused": 11}
    assert json.loads((cache / "report.json").read_text())["groups"][0]["reused"] in (11, 12)
