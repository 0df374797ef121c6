"""A sample's own failure: what its unit raises or returns puts it into quarantine."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.preprocess import encode_batches
from ray_diffsynth.preprocess.messages import unpack
from ray_diffsynth.preprocess.records import Failure
from tests.preprocess.failing import Bench, numbers, raising


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
