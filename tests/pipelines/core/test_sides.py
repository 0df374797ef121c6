"""The sides of a parameter, and its type, are the same behind a cache as without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ray_diffsynth.cache.codec import as_cached
from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.pipelines.core.runner import run_units
from ray_diffsynth.pipelines.core.sides import state_of
from ray_diffsynth.pipelines.core.state import UnitState, make_state
from ray_diffsynth.pipelines.core.unit import PipelineUnit
from ray_diffsynth.preprocess.encode_batches import encode_samples
from ray_diffsynth.tasks import SFT
from ray_diffsynth.training.module import DiffusionTrainingModule

SEEN: list[Any] = []
"""What the last unit of stage 2 got."""


class Embed(PipelineUnit):
    """Stage 1, separate-CFG: `embeds` on the positive side and, with guidance, the negative one."""

    def __init__(self) -> None:
        super().__init__(
            seperate_cfg=True,
            input_params_posi={"text": "prompt"},
            input_params_nega={"text": "negative_prompt"},
            output_params=("embeds",),
        )

    def process(self, pipe: Any, text: str) -> dict[str, Any]:
        return {"embeds": torch.full((1, 2), float(len(text)))}


class Latents(PipelineUnit):
    def __init__(self) -> None:
        super().__init__(input_params=("pixels",), output_params=("input_latents",))

    def process(self, pipe: Any, pixels: Tensor) -> dict[str, Any]:
        return {"input_latents": pixels * 2}


class Spread(PipelineUnit):
    """Stage 1, takes over: values of many types, on all the sides."""

    def __init__(self) -> None:
        super().__init__(take_over=True, input_params=("prompt", "embeds"), output_params=tuple("abcdef"))

    def process(self, pipe: Any, inputs_shared: Any, inputs_posi: Any, inputs_nega: Any) -> Any:
        inputs_shared |= {"a": ("tuple", [1, True, None, 0.5]), "b": np.arange(6, dtype=np.int16).reshape(2, 3)}
        inputs_posi |= {"a": inputs_posi["prompt"], "c": np.float32(0.1), "d": [torch.ones(1), {"k": np.array(3)}]}
        inputs_nega |= {"a": 7, "e": inputs_posi["embeds"] - 1, "f": Image.new("RGB", (2, 1), (1, 2, 3))}
        return inputs_shared, inputs_posi, inputs_nega


class Gather(PipelineUnit):
    """Stage 2, takes over: looks on each side for what stage 1 has put there."""

    def __init__(self) -> None:
        super().__init__(
            take_over=True,
            input_params=("prompt", "embeds", *"abcdef"),
            output_params=("mixed",),
            onload_model_names=("encoder",),
        )

    def process(self, pipe: Any, inputs_shared: Any, inputs_posi: Any, inputs_nega: Any) -> Any:
        own = self.fetch_input_params()
        SEEN[:] = [{n: v for n, v in side.items() if n in own} for side in (inputs_shared, inputs_posi, inputs_nega)]
        mixed = pipe.encoder(inputs_posi["embeds"]) + inputs_nega["e"] + inputs_nega.get("embeds", 0)
        return {**inputs_shared, "mixed": mixed}, inputs_posi, inputs_nega


class Negative(PipelineUnit):
    """Stage 2, separate-CFG: reads on the negative side what a unit of stage 1 has put there."""

    def __init__(self) -> None:
        super().__init__(
            seperate_cfg=True,
            input_params_posi={"value": "embeds"},
            input_params_nega={"value": "e"},
            output_params=("again",),
            onload_model_names=("encoder",),
        )

    def process(self, pipe: Any, value: Tensor) -> dict[str, Any]:
        return {"again": pipe.encoder(value)}


class Pipe(BasePipeline):
    family = "sides"
    schedule = "Z-Image"
    parts = {"encoder": Part("encoder", "m:E"), "dit": Part("dit", "m:D")}
    guidance = 1.0

    def __init__(self, *units: PipelineUnit) -> None:
        super().__init__(torch_dtype=torch.float32)
        self.units = list(units)
        torch.manual_seed(0)
        self.encoder, self.dit = nn.Linear(2, 2), nn.Linear(2, 2)
        self.scheduler.set_timesteps(1000, training=True)
        self.model_fn = model_fn

    def training_settings(self) -> dict[str, Any]:
        return {**super().training_settings(), "cfg_scale": self.guidance}


def model_fn(*, dit: Any, latents: Tensor, timestep: Tensor, mixed: Tensor | None = None, again: Any = None) -> Tensor:
    made: Tensor = dit(latents) + (0 if mixed is None else mixed) + (0 if again is None else again)
    return made


def samples() -> list[dict[str, Any]]:
    return [
        {"pixels": torch.full((1, 2), float(n)), "prompt": "p" * (n + 1), "negative_prompt": "n" * n} for n in range(2)
    ]


def module(pipe: Pipe, *, split: bool, trained: Sequence[str] = ("encoder",)) -> DiffusionTrainingModule:
    return DiffusionTrainingModule(pipe, SFT(), trained=trained, inputs=tuple(samples()[0]), split=split)


def typed(value: Any) -> Any:
    """The value with the types of all that it holds."""
    if isinstance(value, Tensor):
        return "tensor", value.dtype, tuple(value.shape), value.stride(), value.tolist()
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, value.tolist()
    if isinstance(value, Image.Image):
        return "image", value.mode, value.size, value.tobytes()
    if isinstance(value, (list, tuple)):
        return type(value), [typed(item) for item in value]
    if isinstance(value, dict):
        return {name: typed(item) for name, item in value.items()}
    return type(value), value


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_take_over_unit_finds_every_side_behind_a_cache(guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipe, "guidance", guidance)
    pipe = Pipe(Latents(), Embed(), Spread(), Gather())
    whole, split = module(pipe, split=False), module(pipe, split=True)
    assert set(whole.stages.sided) == {"embeds", *"abcdef"}
    assert not {"prompt", "input_latents"} & set(whole.stages.sided)
    rows, keys = samples(), [SampleKey(0, 0, 0, str(n)) for n in range(2)]
    cached = [as_cached(whole.encode(row)) for row in rows]

    start = make_state(pipe.units, {**pipe.training_settings(), **rows[1]})
    run_units(pipe.units, pipe, [start])  # the program as it stands, with no split at all
    plain = typed(SEEN)
    assert [set(side) for side in SEEN] == [
        {"a", "b"}, {"prompt", "embeds", "a", "c", "d"}, {"a", "e", "f", *(("embeds",) if guidance != 1 else ())}
    ]  # fmt: skip
    expected = whole(rows, keys).loss
    assert typed(SEEN) == plain
    assert torch.equal(split(cached, keys).loss, expected)
    assert typed(SEEN) == plain


def test_a_separate_unit_reads_the_negative_side_behind_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipe, "guidance", 4.0)
    pipe = Pipe(Latents(), Embed(), Spread(), Negative())
    whole, split = module(pipe, split=False), module(pipe, split=True)
    assert whole.stages.sided == ("e",)
    row, key = samples()[1], SampleKey(0, 0, 0, "a")
    assert torch.equal(split([as_cached(whole.encode(row))], [key]).loss, whole([row], [key]).loss)


def test_stage_1_keeps_the_sides_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its actors run the units of a group in batches; what they hand on is what the module encodes."""
    pipe = Pipe(Latents(), Embed(), Spread(), Gather())
    whole = module(pipe, split=False)
    rows = samples()
    for group in whole.stages.groups:
        found, _ = encode_samples(pipe, group, pipe.training_settings(), rows, 2)
        for row, values in zip(rows, found, strict=True):
            expected = whole.encode(row)
            assert typed(values) == typed({name: expected[name] for name in group.parameters if name in expected})


def test_families_without_such_units_are_cached_as_before() -> None:
    pipe = Pipe(Latents(), Embed(), Spread())
    assert module(pipe, split=True, trained=["dit"]).stages.sided == ()
    row = module(pipe, split=False, trained=["dit"]).encode(samples()[0])
    assert set(row) == {"input_latents"} and isinstance(row["input_latents"], Tensor)


def test_a_row_without_sides_is_refused() -> None:
    for value in (torch.ones(2), {}, {"left": 1}):
        with pytest.raises(PipelineError, match="holds 'a' without its sides.* run stage 1 again"):
            state_of([], {"a": value}, ["a"])
    assert state_of([], {"a": {"nega": 1}, "b": 2}, ["a"]) == UnitState({"b": 2}, {}, {"a": 1})


def test_unsplit_training_sees_tensors_as_they_come_from_a_cache() -> None:
    """Other strides may take another kernel."""

    class Turned(Latents):
        def process(self, pipe: Any, pixels: Tensor) -> dict[str, Any]:
            return {"input_latents": torch.arange(6.0).reshape(3, 2).t()[:, None]}

    whole = module(Pipe(Turned()), split=False, trained=["dit"])
    made = whole.encode(samples()[0])
    assert typed(as_cached(made)) == typed(made) and made["input_latents"].is_contiguous()
