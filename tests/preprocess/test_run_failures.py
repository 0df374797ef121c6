"""What ends a run: a mistake of the run, a lost device, a full disk, a model that cannot be loaded."""

from __future__ import annotations

import errno
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from ray_diffsynth import storage
from ray_diffsynth.pipelines.core.errors import MissingInputError, MissingModelError
from ray_diffsynth.preprocess import decode, encoder, messages
from ray_diffsynth.preprocess.datasink import ShardSink
from ray_diffsynth.preprocess.encode_batches import DeviceError
from ray_diffsynth.preprocess.encoder import Encoder
from ray_diffsynth.preprocess.errors import EncoderError
from ray_diffsynth.storage import StorageError
from tests.preprocess import counting
from tests.preprocess.failing import Bench, Process, always


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
    bench.patch.setattr(counting.ImageUnit, "process_batch", process)
    one = Encoder(bench.spec)
    one.monitor = SimpleNamespace(
        report=SimpleNamespace(remote=lambda name, reason: told.append(reason)),
        running=SimpleNamespace(remote=lambda *_: None),
    )
    context = SimpleNamespace(get_actor_id=lambda: "a", current_actor=None)
    bench.patch.setattr(encoder, "ray", SimpleNamespace(get_runtime_context=lambda: context))
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
    sink = ShardSink(str(tmp_path / "cache"), "vae", bench.spec.group.parameters, "none")
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
        report=SimpleNamespace(remote=lambda name, *rest: told.append(rest[0]) if name == "give_up" else [rest[1]] * 5)
    )
    context = SimpleNamespace(get_actor_id=lambda: "a", get_node_id=lambda: "n", get_worker_id=lambda: "w")
    monkeypatch.setattr(encoder, "living", lambda nodes: nodes)
    fake = SimpleNamespace(get=lambda value: value, get_runtime_context=lambda: context)
    monkeypatch.setattr(encoder, "ray", fake)
    with pytest.raises(EncoderError, match="died each time while it loaded its models"):
        Encoder(bench.spec, monitor)
    assert len(told) == 1 and "the encoder of vae cannot be loaded" in told[0]
