"""What a unit does beside its declaration is found."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ray_diffsynth.pipelines import check_units
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.content import content_of
from ray_diffsynth.pipelines.core.errors import MissingInputError, UnitError
from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.pipelines.core.unit import PipelineUnit

Process = Callable[..., Any]


class Pipe(BasePipeline):
    parts = {"vae": Part("vae", "m:V", ("processor",)), "dit": Part("dit", "m:D")}
    companions = {"processor": Part("processor", "m:P")}

    def __init__(self, *units: PipelineUnit) -> None:
        super().__init__(torch_dtype=torch.float32)
        self.units = list(units)
        self.vae, self.dit = nn.Linear(2, 2), nn.Linear(2, 2)
        self.processor: Any = SimpleNamespace(size=4)
        self.register_buffer("table", torch.zeros(2))


class Direct(PipelineUnit):
    def __init__(self, body: Process, models: tuple[str, ...] = ()) -> None:
        super().__init__(input_params=("x", "nested"), output_params=("y",), onload_model_names=models)
        self.body = body

    def process(self, pipe: Any, x: Tensor, nested: Any) -> dict[str, Any]:
        return {"y": self.body(self, pipe, x, nested)}


class TakeOver(PipelineUnit):
    def __init__(self, body: Process) -> None:
        super().__init__(take_over=True, input_params=("x",), output_params=("y",))
        self.body = body

    def process(self, pipe: Any, inputs_shared: Any, inputs_posi: Any, inputs_nega: Any) -> Any:
        self.body(inputs_shared, inputs_posi)
        return inputs_shared, inputs_posi, inputs_nega


def sample() -> dict[str, Any]:
    nested = {"a": [torch.ones(2), (np.arange(3),)], "b": Image.new("RGB", (2, 2)), "c": {1, 2}}
    return {"x": torch.ones(2), "nested": nested, "z": torch.ones(2), "prompt": "p"}


def alone(value: Tensor) -> Tensor:
    return value.clone()


EFFECTS: dict[str, tuple[Process, str]] = {
    "in place": (lambda unit, pipe, x, nested: x.mul_(2), "changes the parameter 'x' in place"),
    "by a view": (lambda unit, pipe, x, nested: x[:1].zero_(), "changes the parameter 'x' in place"),
    "by data": (lambda unit, pipe, x, nested: x.data.copy_(torch.zeros(2)), "changes the parameter 'x' in place"),
    "by shape": (lambda unit, pipe, x, nested: x.unsqueeze_(0), "changes the parameter 'x' in place"),
    "nested tensor": (lambda unit, pipe, x, nested: nested["a"][0].add_(1), "changes the parameter 'nested' in place"),
    "nested list": (lambda unit, pipe, x, nested: nested["a"].append(1), "changes the parameter 'nested' in place"),
    "nested array": (lambda unit, pipe, x, nested: nested["a"][1][0].fill(7), "changes the parameter 'nested' in"),
    "nested dict": (lambda unit, pipe, x, nested: nested.update(d=1), "changes the parameter 'nested' in place"),
    "nested set": (lambda unit, pipe, x, nested: nested["c"].add(3), "changes the parameter 'nested' in place"),
    "image": (lambda unit, pipe, x, nested: nested["b"].putpixel((0, 0), (9, 9, 9)), "'nested' in place"),
    "left on the pipe": (lambda unit, pipe, x, nested: setattr(pipe, "left", x), "sets or changes pipe.left"),
    "a changed attribute": (lambda unit, pipe, x, nested: setattr(pipe, "torch_dtype", torch.half), "pipe.torch_dtype"),
    "a buffer": (lambda unit, pipe, x, nested: pipe.table.add_(1), "sets or changes pipe.table"),
    "a module": (lambda unit, pipe, x, nested: setattr(pipe, "adapter", nn.Linear(1, 1)), "changes pipe.adapter"),
    "the list of units": (lambda unit, pipe, x, nested: pipe.units.append(unit), "changes pipe.units"),
    "left on itself": (lambda unit, pipe, x, nested: setattr(unit, "last", x), "its own attribute 'last'"),
    "another model": (lambda unit, pipe, x, nested: pipe.vae(x), "uses 'vae': name its model in onload_model_names"),
    "a model's weights": (lambda unit, pipe, x, nested: pipe.dit.weight + 1, "uses 'dit': name its model"),
    "a processor": (lambda unit, pipe, x, nested: pipe.processor.size, "uses 'processor': name its model"),
    "torch's generator": (lambda unit, pipe, x, nested: torch.rand(2), "returns another 'y' the second time"),
    "numpy's generator": (lambda unit, pipe, x, nested: np.random.rand(), "returns another 'y' the second time"),
    "python's generator": (lambda unit, pipe, x, nested: random.random(), "returns another 'y' the second time"),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_an_effect_is_found(name: str) -> None:
    body, message = EFFECTS[name]
    with pytest.raises(UnitError, match=f"^Direct .*{message}"):
        check_units(Pipe(Direct(body)), sample())


def test_all_of_a_unit_is_named_at_once() -> None:
    def body(unit: Any, pipe: Any, x: Tensor, nested: Any) -> Tensor:
        pipe.left = x
        nested["a"] = None
        return x.mul_(2)

    with pytest.raises(UnitError) as caught:
        check_units(Pipe(Direct(body)), sample())
    assert all(text in str(caught.value) for text in ("parameter 'x'", "parameter 'nested'", "pipe.left"))


def test_what_is_declared_passes_and_everything_is_left_as_it_was() -> None:
    def body(unit: Any, pipe: Any, x: Tensor, nested: Any) -> Tensor:
        pipe.load_models_to_device(("vae",))
        pipe.vae.note = pipe.processor.size  # a declared model's state is its own
        made: Tensor = pipe.vae(x) + torch.rand(2, generator=torch.Generator().manual_seed(0))
        return made

    pipe, inputs = Pipe(Direct(body, ("vae",))), sample()
    names, generators = list(pipe._modules), (torch.get_rng_state(), random.getstate())
    values = check_units(pipe, inputs)
    assert set(values) == {*inputs, "y"} and isinstance(values["y"], Tensor)
    assert list(pipe._modules) == names and isinstance(pipe.dit, nn.Linear) and pipe.processor.size == 4
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    part = Pipe(Direct(body, ("vae.weight",)))  # a part of a model is the model
    check_units(part, inputs)


def test_what_is_around_is_restored_when_a_unit_fails() -> None:
    def body(unit: Any, pipe: Any, x: Tensor, nested: Any) -> Tensor:
        raise ValueError("mine")

    pipe = Pipe(Direct(body))
    with pytest.raises(ValueError, match="mine"):
        check_units(pipe, sample())
    assert isinstance(pipe.vae, nn.Linear) and isinstance(pipe.processor, SimpleNamespace)
    with pytest.raises(MissingInputError, match="Direct needs 'x'"):
        check_units(pipe, {})


READS: dict[str, tuple[Process, str]] = {
    "a value": (lambda shared, posi: shared.update(y=shared["z"] + 1), "reads 'z': name it in input_params"),
    "by torch": (lambda shared, posi: shared.update(y=torch.add(shared["x"], shared["z"])), "reads 'z'"),
    "of a side": (lambda shared, posi: shared.update(y=posi["prompt"].upper()), "reads 'prompt'"),
    "under another name": (lambda shared, posi: shared.update(y=shared["z"]), "makes 'y' of parameters that it does"),
    "within a list": (lambda shared, posi: shared.update(y=[shared["z"]]), "makes 'y' of parameters that it does"),
    "by its type": (lambda shared, posi: shared.update(y=isinstance(shared["z"], Tensor)), "returns another 'y'"),
    "silently": (lambda shared, posi: shared.update(y=_tried(shared)), "reads 'z'"),
}


def _tried(shared: Mapping[str, Any]) -> Any:
    try:
        return shared["z"] + 1
    except TypeError:
        return 0


@pytest.mark.parametrize("name", READS)
def test_a_read_that_is_not_declared_is_found(name: str) -> None:
    body, message = READS[name]
    with pytest.raises(UnitError, match=f"TakeOver .*{message}"):
        check_units(Pipe(TakeOver(body)), sample())


def test_what_a_take_over_unit_hands_on_passes() -> None:
    values = check_units(Pipe(TakeOver(lambda shared, posi: shared.update(y=shared["x"] + 1))), sample())
    assert values["y"].tolist() == [2.0, 2.0] and values["z"].tolist() == [1.0, 1.0]
    with pytest.raises(UnitError, match="wrote 'w' without declaring it"):
        check_units(Pipe(TakeOver(lambda shared, posi: shared.update(w=1))), sample())


def test_contents_are_told_apart() -> None:
    base = torch.arange(4.0)
    same = [base, base.clone(), base.reshape(2, 2).t().contiguous().t().reshape(4)]
    assert len({content_of(value) for value in same}) == 1
    other = [base, base.half(), base.reshape(2, 2), base.numpy(), base.tolist(), tuple(base.tolist()), base + 1]
    other += [1, True, 1.0, "1", b"1", None, [], (), {}, {"a": 1}, {"a": 1.0}, Image.new("L", (2, 2))]
    other += [Image.new("L", (1, 4)), np.float32(1), {1}, frozenset({1})]
    assert len({content_of(value) for value in other}) == len(other)
    ring: list[Any] = []
    ring.append(ring)
    assert content_of(ring) == content_of(ring)
