"""One shard and an encoder whose unit fails as a test says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_diffsynth.cache.store import shard_name
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.preprocess.decode import Decoder
from ray_diffsynth.preprocess.encode_batches import encode_samples
from ray_diffsynth.preprocess.encoder import Encoder
from ray_diffsynth.preprocess.messages import EncoderSpec, shard_row
from ray_diffsynth.preprocess.shards import ShardPlan, Wanted
from tests.preprocess import counting
from tests.preprocess.counting import FAMILY, build_model

Process = Callable[[Any, Any, list[dict[str, Any]]], list[dict[str, Any]]]


class Bench:
    """One shard of twelve images, decoded, and an encoder whose unit does what a test says."""

    def __init__(self, tmp_path: Path, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        config = PreprocessConfig(
            model=str(build_model(tmp_path / "model")), family=FAMILY, dataset_base_path=str(few), batch_size=4
        )
        plan = RunPlan.resolve(config)
        self.spec = EncoderSpec(plan, plan.group("vae"), 4)
        size = Bucket(64, 64)
        rows = (Wanted(f"k{n}", f"{n:04d}.png", {"image": f"{n:04d}.png"}, size.name, size) for n in range(12))
        self.shard = shard_row(ShardPlan(shard_name(["k"]), size.name, tuple(rows)))

    def decode(self) -> dict[str, Any]:
        return Decoder(self.spec)(self.shard)

    def encode(self, process: Process) -> dict[str, Any]:
        shard = self.decode()
        self.patch.setattr(counting.ImageUnit, "process_batch", process)
        return Encoder(self.spec)(shard)

    def results(self, process: Process, count: int, batch_size: int) -> tuple[list[Any], int]:
        """What `encode` makes of samples that are the numbers 0, 1, 2 …"""
        self.patch.setattr(counting.ImageUnit, "process_batch", process)
        one = Encoder(self.spec)
        return encode_samples(one.pipe, one.group, {}, [{"input_image": n} for n in range(count)], batch_size)


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
