"""LoRA files beside a pipeline's weights, at a strength that can be changed between two images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ray_diffsynth.models.lora import add_lora, is_adapted, load_lora_state, lora_parameters
from ray_diffsynth.models.lora_file import LoraError, lora_prefixes, read_lora
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.lora_keys import lora_names

_TEXT_ENCODER = ("text_encoder.", "pipe.text_encoder.")


def attach_loras(pipe: BasePipeline, paths: Sequence[str]) -> None:
    """Put the LoRAs of all files beside the models that they are for, at strength 1; several add up.

    Raises LoraError naming the file: not readable, DoRA, or layers that the model does not have.
    """
    found: dict[str, list[dict[str, Tensor]]] = {}
    for path in paths:
        prefixes = lora_prefixes(path)
        if "" in prefixes and len(prefixes) > 1:
            raise LoraError(f"{path} has keys with and without a model's name ({', '.join(filter(None, prefixes))})")
        for prefix in prefixes:
            model, start = _model_of(pipe, path, prefix)
            module = getattr(pipe, model, None)
            if not isinstance(module, nn.Module):
                raise LoraError(f"{path} is for {model}, which {type(pipe).__name__} has not loaded")
            state, _ = read_lora(path, prefix=start)
            names = lora_names(pipe, model)
            named = {names(key): value for key, value in state.items()}
            _check(module, named, path, model)
            found.setdefault(model, []).append(named)
    for model, states in found.items():
        _attach(getattr(pipe, model), joined(states), model, pipe.torch_dtype)


def set_lora_scale(pipe: BasePipeline, scale: float) -> None:
    """Let the LoRAs of `attach_loras` act at `scale`; 0 is the model without them."""
    for module in pipe.modules():
        if is_adapted(module):
            module.set_scale("default", scale)


def joined(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One LoRA that does what all do together: per layer A below A and B beside B, of one rank by rows of zeros."""
    layers = dict.fromkeys(key.rsplit(".lora_", 1)[0] for state in states for key in state)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        own = [state for state in states if f"{layer}.lora_A.weight" in state]
        down = torch.cat([state[f"{layer}.lora_A.weight"].float() for state in own])
        up = torch.cat([state[f"{layer}.lora_B.weight"].float() for state in own], dim=1)
        pairs[layer] = (down, up)
    rank = max(len(down) for down, _ in pairs.values())
    result: dict[str, Tensor] = {}
    for layer, (down, up) in pairs.items():
        missing = rank - len(down)
        result[f"{layer}.lora_A.weight"] = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        result[f"{layer}.lora_B.weight"] = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], dim=1)
    return result


def _model_of(pipe: BasePipeline, path: str, prefix: str) -> tuple[str, str]:
    """(model, what its keys start with) for keys of a file that start with `prefix`."""
    if prefix in _TEXT_ENCODER:
        return "text_encoder", prefix
    if prefix == "":  # bare, or a model that only this family has
        state, _ = read_lora(path, prefix="")
        for part in pipe.parts:
            if all(key.startswith(f"{part}.") for key in state):
                return part, f"{part}."
    return pipe.in_iteration_models[0], prefix


def _check(module: nn.Module, state: Mapping[str, Tensor], path: str, model: str) -> None:
    if any(key.endswith(".lora_magnitude_vector") for key in state):
        raise LoraError(f"{path} is a DoRA, which has no strength to set; load it in diffusers: pipe.load_lora_weights")
    there = {name for name, _ in module.named_modules()}
    unknown = sorted({layer for key in state if (layer := key.rsplit(".lora_", 1)[0]) not in there})
    if unknown:
        raise LoraError(
            f"{path} names {len(unknown)} layers that the {model} does not have, such as {unknown[0]}; it is for "
            "another model"
        )


def _attach(module: nn.Module, state: Mapping[str, Tensor], model: str, dtype: torch.dtype) -> None:
    layers = dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in state)
    rank = len(next(value for key, value in state.items() if key.endswith(".lora_A.weight")))
    targets = "re:" + "|".join(re.escape(layer) for layer in layers)
    add_lora(module, rank=rank, alpha=None, target_modules=targets, seed=0, name=model)
    load_lora_state(module, state)
    # The adapter alone: the model may keep some of its layers in fp32.
    for parameter in lora_parameters(module).values():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
