"""How the LoRA of a pipeline's model names its keys in a file, and how a file's keys are found in the model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ray_diffsynth.pipelines.base import BasePipeline


def submodule(pipe: BasePipeline, name: str) -> torch.nn.Module:
    """`text_encoder` or a part of it, `text_encoder.layers.3`. AttributeError if there is none."""
    return pipe.get_submodule(name)


def lora_prefix(pipe: BasePipeline, model: str) -> str:
    """What stands before a LoRA's keys: the family's prefix for the model that denoises, `<model>.` for another."""
    return pipe.lora_prefix if model in pipe.in_iteration_models else f"{model}."


def lora_rename(pipe: BasePipeline, model: str) -> Callable[[str], str]:
    """How the LoRA of `model` names its keys in a file, after the prefix."""
    return pipe.original_lora_key if model in pipe.in_iteration_models else lambda key: key


def lora_names(pipe: BasePipeline, model: str) -> Callable[[str], str]:
    """Inverse of `lora_rename`; a key that has the module's own name already keeps it."""
    rename = lora_rename(pipe, model)
    paths = [path for path, _ in submodule(pipe, model).named_modules()]
    own = {rename(key): key for path in paths for key in (f"{path}.lora_A.weight", f"{path}.lora_B.weight")}
    return lambda key: own.get(key, key)
