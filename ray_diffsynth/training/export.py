"""The files that a run is for: a LoRA, or the weights of a model trained in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save

from ray_diffsynth.data.storage import write_bytes_atomic
from ray_diffsynth.models.lora import LoraInfo, export_lora, lora_state
from ray_diffsynth.pipelines.base import BasePipeline
from ray_diffsynth.training.metrics import output_file


@dataclass(frozen=True)
class Trained:
    """What of a pipeline is trained: `lora` on the module `lora_model`, and all weights of the modules `full`."""

    lora_model: str | None
    lora: LoraInfo | None
    full: tuple[str, ...]


def submodule(pipe: BasePipeline, name: str) -> torch.nn.Module:
    """`text_encoder` or a part of it, `text_encoder.layers.3`. AttributeError if there is none."""
    return pipe.get_submodule(name)


def lora_prefix(pipe: BasePipeline, model: str) -> str:
    """What stands before a LoRA's keys: the family's prefix for the model that denoises, `<model>.` for another."""
    return pipe.lora_prefix if model in pipe.in_iteration_models else f"{model}."


def export_trained(pipe: BasePipeline, trained: Trained, output_path: str, name: str) -> list[str]:
    """Write `<output_path>/<name>.safetensors` (the LoRA, or the one model trained in full); returns the files.

    Each further model goes to `<name>.<model>.safetensors`, with the model's own keys and the pipeline's dtype.
    """
    written: list[str] = []
    if trained.lora is not None and trained.lora_model is not None:
        path = output_file(output_path, f"{name}.safetensors")
        state = lora_state(submodule(pipe, trained.lora_model))
        info = trained.lora
        prefix = lora_prefix(pipe, trained.lora_model)
        export_lora(state, prefix=prefix, rank=info.rank, alpha=info.alpha, rslora=info.rslora, path=path)
        written.append(path)
    for model in trained.full:
        alone = len(trained.full) == 1 and not written
        path = output_file(output_path, f"{name}.safetensors" if alone else f"{name}.{model}.safetensors")
        tensors = {key: _plain(value, pipe.torch_dtype) for key, value in submodule(pipe, model).state_dict().items()}
        write_bytes_atomic(path, save(tensors, metadata={"format": "pt"}))
        written.append(path)
    return written


def _plain(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    value = value.detach().cpu()
    # clone: a state_dict may hold two names of one tensor (tied weights), which safetensors refuses.
    return (value.to(dtype) if value.is_floating_point() else value).clone(memory_format=torch.contiguous_format)


def describe(trained: Trained, parameters: Sequence[torch.nn.Parameter]) -> str:
    """One line for the log: what is trained, and how many values."""
    count = sum(p.numel() for p in parameters)
    what = [f"LoRA of rank {trained.lora.rank} on {trained.lora_model}"] if trained.lora else []
    what += [f"all of {model}" for model in trained.full]
    return f"training {' and '.join(what)}: {count / 1e6:.3g} M values"
