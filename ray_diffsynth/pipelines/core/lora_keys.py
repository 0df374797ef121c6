"""How the LoRA of a pipeline's model names its keys in a file, and how a file's keys are found in the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ray_diffsynth.models.lora import LoraInfo, fuse_lora, load_lora_file, read_lora
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.graph import model_root


def submodule(pipe: BasePipeline, name: str) -> torch.nn.Module:
    """`text_encoder` or a part of it, `text_encoder.layers.3`. AttributeError if there is none."""
    return pipe.get_submodule(name)


def lora_prefix(pipe: BasePipeline, model: str) -> str:
    """What stands before a LoRA's keys: the family's prefix for the model that denoises, `<model>.` for another."""
    return pipe.lora_prefix if model_root(model) in pipe.in_iteration_models else f"{model}."


def lora_rename(pipe: BasePipeline, model: str) -> Callable[[str], str]:
    """How the LoRA of `model` names its keys in a file, after the prefix."""
    if model_root(model) not in pipe.in_iteration_models:
        return lambda key: key
    inside = _inside(model)
    return lambda key: pipe.original_lora_key(inside + key)


def own_prefix(pipe: BasePipeline, model: str) -> str:
    """diffusers' own: the folder of the model, and the place in it of a part."""
    return f"{pipe.parts[model_root(model)].subfolder}.{_inside(model)}"


def lora_names(pipe: BasePipeline, model: str) -> Callable[[str], str]:
    """Inverse of `lora_rename`; a key that has the module's own name already keeps it."""
    rename, inside = lora_rename(pipe, model), _inside(model)
    paths = [path for path, _ in submodule(pipe, model).named_modules()]
    keys = [f"{path}.lora_{what}" for path in paths for what in ("A.weight", "B.weight", "magnitude_vector")]
    own = {f"{inside}{key}": key for key in keys} | {rename(key): key for key in keys}
    return lambda key: own.get(key, key)


def read_model_lora(pipe: BasePipeline, model: str, path: str) -> dict[str, Tensor]:
    """A file's tensors under the names of `model`, whoever wrote it: an export of ours, or a layout of `read_lora`."""
    state, _ = read_lora(path, prefixes=_prefixes(pipe, model))
    names = lora_names(pipe, model)
    return {names(key): value for key, value in state.items()}


def fuse_model_lora(pipe: BasePipeline, model: str, path: str) -> None:
    """Add a file's LoRA into the weights of `model`. Raises LoraError as `read_lora` and `fuse_lora`."""
    fuse_lora(submodule(pipe, model), read_model_lora(pipe, model, path))


def load_model_lora(pipe: BasePipeline, model: str, path: str, info: LoraInfo) -> None:
    """Put a file's LoRA into the one that `model` has. Raises LoraError as `load_lora_file`."""
    rename, prefixes = lora_names(pipe, model), _prefixes(pipe, model)
    load_lora_file(submodule(pipe, model), path, info, rename=rename, prefixes=prefixes)


def _inside(model: str) -> str:
    """`text_encoder.layers.3` -> `layers.3.`; nothing for a whole model."""
    inside = model.partition(".")[2]
    return f"{inside}." if inside else ""


def _prefixes(pipe: BasePipeline, model: str) -> tuple[str, ...]:
    """What the keys of a file for `model` start with, the most particular first."""
    root = model_root(model)
    found = [f"{model}.", own_prefix(pipe, model)] if root in pipe.parts else [f"{model}."]
    found += [f"{root}.", f"{pipe.parts[root].subfolder}."] if root in pipe.in_iteration_models else []
    return tuple(dict.fromkeys([*found, *(f"pipe.{prefix}" for prefix in found), lora_prefix(pipe, model)]))
