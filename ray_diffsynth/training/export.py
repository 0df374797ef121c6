"""The files that a run is for: a LoRA, or the weights of a model trained in full."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ray_diffsynth.models.lora import LoraInfo, export_lora, lora_state
from ray_diffsynth.models.tensor_file import tensor_file
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.graph import model_root
from ray_diffsynth.pipelines.core.lora_keys import lora_prefix, lora_rename, own_prefix, submodule
from ray_diffsynth.storage import join, list_files, write_bytes_atomic
from ray_diffsynth.training.report.metrics_log import output_file


@dataclass(frozen=True)
class Trained:
    """What of a pipeline is trained: a LoRA on each of the modules that `loras` name, and all weights of `full`."""

    loras: tuple[LoraInfo, ...]
    full: tuple[str, ...]


@dataclass(frozen=True)
class TrainedFile:
    """A copy of trained weights as they are now, and where `write` puts them, whenever that is."""

    path: str
    write: Callable[[], None]


def trained_files(
    pipe: BasePipeline, trained: Trained, output_path: str, name: str, *, layout: str = "family"
) -> list[TrainedFile]:
    """What is trained, for `<output_path>/<name>.safetensors` (the LoRA, or the one model trained in full).

    Of several LoRAs that one is the denoising model's, or the first. Each further LoRA or model goes to
    `<name>.<model>.safetensors`; a model has its own keys and the pipeline's dtype. layout: of the LoRA's keys, the
    family's (which diffusers, ComfyUI and DiffSynth-Studio load) or "diffusers": `<subfolder>.<its own names>`. A DoRA
    always has the latter: diffusers converts no other names of it.
    """
    files: list[TrainedFile] = []
    for info in sorted(trained.loras, key=lambda info: model_root(info.name) not in pipe.in_iteration_models):
        path = output_file(output_path, f"{name}.{info.name}.safetensors" if files else f"{name}.safetensors")
        state = lora_state(submodule(pipe, info.name))
        dora = any(key.endswith("lora_magnitude_vector") for key in state)
        own_names = (layout == "diffusers" or dora) and model_root(info.name) in pipe.parts
        prefix = own_prefix(pipe, info.name) if own_names else lora_prefix(pipe, info.name)
        write = partial(
            export_lora,
            state,
            prefix=prefix,
            rank=info.rank,
            alpha=info.alpha,
            rslora=info.rslora,
            path=path,
            rename=None if own_names else lora_rename(pipe, info.name),
        )
        files.append(TrainedFile(path, write))
    for model in trained.full:
        alone = len(trained.full) == 1 and not files
        path = output_file(output_path, f"{name}.safetensors" if alone else f"{name}.{model}.safetensors")
        tensors = {key: _plain(value, pipe.torch_dtype) for key, value in submodule(pipe, model).state_dict().items()}
        files.append(TrainedFile(path, partial(_write_model, path, tensors)))
    return files


def _write_model(path: str, tensors: Mapping[str, torch.Tensor]) -> None:
    write_bytes_atomic(path, tensor_file(tensors, {"format": "pt"}))


def newest_file(output_path: str, steps_per_epoch: int, until: int) -> str | None:
    """Path of the LoRA or model that a run wrote last, in its first `until` steps; None if there is none.

    `epoch-4.safetensors` was written after five epochs, wherever that is among the `step-…` files: --save_steps may
    have changed when the run went on.
    """
    steps: dict[int, str] = {}
    for name in list_files(output_path, suffix=".safetensors"):
        if found := re.fullmatch(r"(step|epoch)-(\d+)\.safetensors", name):
            number = int(found[2])
            steps[number if found[1] == "step" else (number + 1) * steps_per_epoch] = name
    written = [step for step in steps if step <= until]
    return join(output_path, steps[max(written)]) if written else None


def _plain(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    value = value.detach().cpu()
    # clone: a state_dict may hold two names of one tensor (tied weights), which safetensors refuses.
    return (value.to(dtype) if value.is_floating_point() else value).clone(memory_format=torch.contiguous_format)


def describe(trained: Trained, parameters: Sequence[torch.nn.Parameter]) -> str:
    """One line for the log: what is trained, and how many values."""
    count = sum(p.numel() for p in parameters)
    what = [f"LoRA of rank {info.rank} on {info.name}" for info in trained.loras]
    what += [f"all of {model}" for model in trained.full]
    return f"training {' and '.join(what)}: {count / 1e6:.3g} M values"
