"""Resumable training state: one safetensors file of tensors and one JSON file of numbers, replaced atomically."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger("demo_recipe")


def scheduled_rate(step: int, *, peak: float, warmup: int, steps: int, cool: int) -> float:
    """The learning rate of a step: warm-up, `peak`, then a straight line to a hundredth over the last `cool` steps."""
    falling = min(1.0, (steps - step) / cool)
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * falling)


class TrainingState:
    """A module, its running average and its optimisers, saved under `folder` and restored from there.

    `step` counts finished optimiser steps and `seconds` the wall-clock time spent on them over all runs.
    """

    def __init__(
        self, folder: Path, module: nn.Module, average: nn.Module, optimizers: dict[str, torch.optim.Optimizer]
    ) -> None:
        self.folder, self.module, self.average, self.optimizers = folder, module, average, optimizers
        self.step, self.seconds = 0, 0.0
        if (folder / "state.json").exists():
            self._restore()

    def steps(self, total: int, save_every: int) -> Iterator[int]:
        """Yield the numbers of the steps still to do; save every `save_every` steps and after the last."""
        clock = time.perf_counter()
        while self.step < total:
            yield self.step
            self.step += 1
            now = time.perf_counter()
            self.seconds, clock = self.seconds + now - clock, now
            if self.step % save_every == 0 or self.step == total:
                self.save()

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average ← decay·average + (1 − decay)·module, with a shorter memory in the first steps."""
        weight = 1 - min(decay, (self.step + 1) / (self.step + 20))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.module.parameters()), weight)

    def save(self) -> None:
        """Write state.safetensors and then state.json, each through a temporary file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.safetensors")
        (self.folder / "state.json.tmp").write_text(
            json.dumps({"step": self.step, "seconds": round(self.seconds, 1)}), "utf-8"
        )
        (self.folder / "state.json.tmp").replace(self.folder / "state.json")

    def _restore(self) -> None:
        numbers = json.loads((self.folder / "state.json").read_text("utf-8"))
        tensors = load_file(self.folder / "state.safetensors")
        self.step, self.seconds = numbers["step"], numbers["seconds"]
        for prefix, module in (("module.", self.module), ("average.", self.average)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, optimizer in self.optimizers.items():
            state = optimizer.state_dict()
            for key in (k for k in tensors if k.startswith(f"{name}.")):
                _, index, slot = key.split(".")
                state["state"].setdefault(int(index), {})[slot] = tensors[key]
            optimizer.load_state_dict(state)
        logger.info("resumed %s at step %d", self.folder, self.step)
