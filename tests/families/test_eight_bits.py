"""`--fp8_base` packs the layers that diffusers' layerwise casting would, and no others; diffusers is the judge."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.training.quantize import (
    ScaledLinear,
    castable,
    castable_bytes,
    describe_packed,
    kept_patterns,
    quantize,
)
from tests.families.cases import FamilyCase
from tests.families.test_families import gradients, module_of, with_lora


def cast_by_diffusers(model: nn.Module) -> set[str]:
    """Paths of the linear layers that diffusers stores in 8 bits."""
    cast = copy.deepcopy(model)
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)  # type: ignore[operator]
    linears = [(path, layer) for path, layer in cast.named_modules() if isinstance(layer, nn.Linear)]
    return {path for path, layer in linears if layer.weight.dtype is torch.float8_e4m3fn}


def test_the_layers_are_those_of_diffusers(case: FamilyCase, loaded: BasePipeline) -> None:
    expected = cast_by_diffusers(loaded.dit)
    assert expected and castable(loaded.dit).keys() == expected
    assert castable_bytes(loaded.dit) == 3 * sum(loaded.dit.get_submodule(p).weight.numel() for p in expected)


def test_a_packed_base_trains_under_a_lora(case: FamilyCase, root: Path, loaded: BasePipeline) -> None:
    """The same layers, whichever the LoRA wraps; the loss is near, and a gradient reaches the LoRA."""
    expected = cast_by_diffusers(loaded.dit)
    pipe, _ = with_lora(case, root)
    encoder = module_of(case, loaded)
    encoder.pipe.scheduler.set_timesteps(training=True)
    rows = [encoder.encode(case.inputs(index)) for index in range(2)]
    whole, _ = gradients(module_of(case, pipe, split=True), rows)
    linears = sum(type(layer) is nn.Linear and not layer.weight.requires_grad for layer in pipe.dit.modules())
    assert {path.removesuffix(".base_layer") for path in castable(pipe.dit)} == expected
    assert quantize(pipe.dit) == len(expected) and not castable(pipe.dit)
    packed = {path for path, layer in pipe.dit.named_modules() if isinstance(layer, ScaledLinear)}
    assert {path.removesuffix(".base_layer") for path in packed} == expected
    loss, found = gradients(module_of(case, pipe, split=True), rows)
    assert loss == pytest.approx(whole, rel=0.05) and loss != whole
    assert found and all(torch.isfinite(gradient).all() for gradient in found.values())
    line = describe_packed("dit", pipe.dit)
    assert f"{len(expected)} linear layers of dit are packed, {linears - len(expected)} keep their precision" in line


class Small(nn.Module):
    """A model of one's own, with layers whose names hold those of others."""

    _skip_layerwise_casting_patterns = ("head$",)

    def __init__(self) -> None:
        super().__init__()
        self.proj_out = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"proj_out": nn.Linear(4, 4), "norm1": nn.ModuleDict({"linear": nn.Linear(4, 4)})})
        self.header, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.abnormal = nn.Linear(4, 4)
        self.requires_grad_(False)


def test_patterns_are_searched_in_whole_paths() -> None:
    model = Small()
    assert kept_patterns(model)[-1] == "head$"
    assert castable(model).keys() == {"block.proj_out", "header"}  # "norm" is found in "abnormal" too: diffusers' rule
    quantize(model)
    assert describe_packed("dit", model) == (
        "8 bits: 2 linear layers of dit are packed, 4 keep their precision "
        "(1 by '^proj_out$', 1 by 'head$', 2 by 'norm')"
    )
