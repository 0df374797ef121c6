"""Where the memory of a training step goes, and what each option would save: for the log, and for out-of-memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ray_diffsynth.config.options import split_names
from ray_diffsynth.diffusion.out_of_memory import is_out_of_memory
from ray_diffsynth.errors import UserError
from ray_diffsynth.pipelines.core.graph import model_root
from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.training.quantize import castable_bytes

GB = 1e9


class OutOfMemory(UserError):
    """Too little memory for a run."""


class MemoryOptions(Protocol):
    """The options that decide what a step holds."""

    @property
    def use_gradient_checkpointing(self) -> bool: ...
    @property
    def gradient_checkpointing_every(self) -> int | None: ...
    @property
    def use_gradient_checkpointing_offload(self) -> bool: ...
    @property
    def fp8_base(self) -> bool: ...
    @property
    def shard_base(self) -> bool: ...
    @property
    def use_dora(self) -> bool: ...
    @property
    def trainable_models(self) -> str | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def gradient_accumulation_steps(self) -> int: ...


@dataclass(frozen=True)
class Footprint:
    """Bytes on one worker. base: frozen weights; linear: those of them that --fp8_base keeps in 8 bits; trained: the
    trained weights with gradients and optimizer state. peak: the most that was ever held; 0 if that is not known.
    """

    base: int
    linear: int
    trained: int
    peak: int

    @classmethod
    def planned(cls, plan: TrainPlan) -> Footprint:
        """About what the models take before they are loaded: as much as their files, half of it for 8 bits."""
        parts = plan.pipeline.parts
        files = {name: plan.source.weight_files(parts[name].subfolder) for name in plan.models if name in parts}
        sizes = {name: sum(file.stat().st_size for file in each) for name, each in files.items()}
        denoising = plan.pipeline.in_iteration_models
        return cls(sum(sizes.values()), sum(sizes.get(name, 0) for name in denoising) // 2, 0, 0)

    @classmethod
    def of(cls, module: nn.Module, denoising: Iterable[nn.Module], states: int, device: torch.device) -> Footprint:
        """denoising: the models in it of which --fp8_base is. states: tensors that the optimizer keeps for each trained
        one (2 for AdamW).
        """
        parameters = list(module.parameters())
        frozen = sum(_bytes(p) for p in parameters if not p.requires_grad)
        trained = sum(_bytes(p) for p in parameters if p.requires_grad) * (2 + states)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        linear = sum(castable_bytes(model) for model in denoising)
        return cls(frozen + sum(_bytes(b) for b in module.buffers()), linear, trained, peak)

    @property
    def activations(self) -> int:
        """What the peak holds beside weights and their states."""
        return max(0, self.peak - self.base - self.trained)


def report(found: Footprint, config: MemoryOptions, workers: int) -> str:
    """One line: the peak, what it consists of, and what each option would save."""
    parts = f"frozen weights {_gb(found.base)}, trained weights with gradients and optimizer {_gb(found.trained)}"
    if found.peak:
        parts = f"{_gb(found.peak)} at the peak of step 1: {parts}, activations {_gb(found.activations)}"
    ways = savings(found, config, workers)
    return f"memory: {parts}" + (f"; would save: {', '.join(ways)}" if ways else "")


def savings(found: Footprint, config: MemoryOptions, workers: int) -> list[str]:
    """Options that are not in use, with what they would save."""
    ways: list[str] = []
    if found.activations and not config.use_gradient_checkpointing:
        ways.append(f"--use_gradient_checkpointing most of {_gb(found.activations)}, for about a third more time")
    elif found.activations and (config.gradient_checkpointing_every or 1) > 1:
        ways.append(f"--gradient_checkpointing_every 1 a part of {_gb(found.activations)}")
    elif found.activations and not config.use_gradient_checkpointing_offload:
        ways.append(f"--use_gradient_checkpointing_offload a part of {_gb(found.activations)}")
    if found.linear and not (config.fp8_base or config.shard_base or config.use_dora):
        ways.append(f"--fp8_base {_gb(found.linear)}")
    whole = "dit" in map(model_root, split_names(config.trainable_models))
    if workers > 1 and not (config.shard_base or config.fp8_base or whole):
        ways.append(f"--shard_base {_gb(found.base * (workers - 1) / workers)}")
    if config.batch_size > 1 and found.activations:
        less = found.activations * (1 - 1 / config.batch_size)
        ways.append(
            f"--batch_size 1 --gradient_accumulation_steps "
            f"{config.batch_size * config.gradient_accumulation_steps} {_gb(less)}"
        )
    return ways


@contextmanager
def explained(
    footprint: Callable[[], Footprint], config: MemoryOptions, workers: int, restart: Callable[[], str]
) -> Iterator[None]:
    """An allocation that fails in the block becomes an error that says what to try, ending in `restart`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(advice(footprint(), config, workers, error) + restart()) from error


def advice(found: Footprint, config: MemoryOptions, workers: int, error: BaseException) -> str:
    """The message for an allocation that failed."""
    ways = savings(found, config, workers)
    held = f"frozen weights {_gb(found.base)}, trained weights with gradients and optimizer {_gb(found.trained)}"
    tries = "; ".join(ways) if ways else "smaller images (--max_pixels in preprocess), or a GPU with more memory"
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return f"out of memory ({reason}). Held: {held}. Try, with what it would save: {tries}"


def _bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())


def _gb(count: float) -> str:
    return f"{count / GB:.2f} GB" if count >= 1e7 else f"{count / 1e6:.1f} MB"
