"""The work on one shard without Ray: batches, out of memory, numbers that are not finite, and bad samples."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.plan.run_plan import PreprocessPlan, RunPlan
from ray_diffsynth.preprocess.decode import Decoder
from ray_diffsynth.preprocess.encode_batches import encode_samples
from ray_diffsynth.preprocess.encoder import LOADS, Encoder, died_loading
from ray_diffsynth.preprocess.messages import EncoderSpec, shard_row, unpack
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.shards import ShardPlan, Wanted
from tests.preprocess import counting
from tests.preprocess.counting import FAMILY, behave, build_model, calls, digest


@pytest.fixture
def plan(tmp_path: Path, few: Path) -> PreprocessPlan:
    config = PreprocessConfig(
        model=str(build_model(tmp_path / "model")),
        family=FAMILY,
        dataset_base_path=str(few),
        output_path=str(tmp_path / "cache"),
    )
    return RunPlan.resolve(config)


def encode_shard(plan: PreprocessPlan, batch_size: int, count: int = 12) -> tuple[Encoder, dict[str, Any]]:
    spec = EncoderSpec(plan, plan.group("vae"), batch_size)
    size = Bucket(64, 64)
    rows = tuple(Wanted(f"k{n}", f"{n:04d}.png", {"image": f"{n:04d}.png"}, size.name, size) for n in range(count))
    encoder = Encoder(spec)
    return encoder, encoder(Decoder(spec)(shard_row(ShardPlan("shard", size.name, rows))))


def pixels(few: Path, number: int) -> str:
    return digest(np.asarray(Image.open(few / f"{number:04d}.png").convert("RGB")))


def test_every_sample_is_encoded_once(plan: PreprocessPlan, tmp_path: Path) -> None:
    _, shard = encode_shard(plan, 5)
    assert [key for key, _ in unpack(shard["inputs"])] == [f"k{n}" for n in range(12)]
    assert json.loads(shard["failed"]) == {} and len(calls(tmp_path / "model", "vae")) == 12


def test_out_of_memory_halves_the_batch_for_good(plan: PreprocessPlan, tmp_path: Path, few: Path) -> None:
    behave(tmp_path / "model", memory=3, too_big=[pixels(few, 5)])
    encoder, shard = encode_shard(plan, 8)
    failed = json.loads(shard["failed"])
    assert list(failed) == ["k5"] and failed["k5"][0] == "OutOfMemoryError"
    assert len(unpack(shard["inputs"])) == 11
    assert set(Counter(calls(tmp_path / "model", "vae")).values()) == {1}
    assert encoder.batch_sizes == {"64x64": 2}


def test_what_is_not_finite_or_fails_is_that_samples_own(
    plan: PreprocessPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, _ = encode_shard(plan, 4, count=1)

    def process_batch(self: Any, pipe: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        numbers = [inputs["input_image"] for inputs in batch]
        if 2 in numbers:
            raise ArithmeticError("two")
        return [{"input_latents": torch.tensor([float("nan") if n == 1 else 1.0])} for n in numbers]

    monkeypatch.setattr(counting.ImageUnit, "process_batch", process_batch)
    results, size = encode_samples(encoder.pipe, encoder.group, {}, [{"input_image": n} for n in range(4)], 4)
    kinds = [result.error if isinstance(result, Failure) else "dict" for result in results]
    assert kinds == ["dict", "NonFiniteError", "ArithmeticError", "dict"] and size == 4
    batches: list[tuple[int, int]] = []
    encode_samples(
        encoder.pipe, encoder.group, {}, [{"input_image": n} for n in (7, 7, 7, 2, 7)], 4, lambda *b: batches.append(b)
    )
    assert batches == [(0, 4), (0, 2), (2, 4), (2, 3), (3, 4), (4, 5)]


def test_an_actor_that_loads_on_dying_machines_is_not_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []

    def living(those: set[str]) -> set[str]:
        asked.append(those)
        return those & {"a", "b"}

    monkeypatch.setattr("ray_diffsynth.preprocess.encoder.living", living)
    assert died_loading(["a"]) == 0 and died_loading(["a"] * LOADS) == LOADS - 1 and asked == []
    assert died_loading(["a"] * (LOADS + 1)) == LOADS
    assert died_loading(["x", "a", "y", "b", "z", "a"]) == 2 and asked[-1] == {"x", "a", "y", "b", "z"}
