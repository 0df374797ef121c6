"""The full state of a run, out of the live objects and back into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ray_diffsynth.training.checkpoint import Checkpoint, CheckpointError
from ray_diffsynth.training.ema import Ema
from ray_diffsynth.training.optim import load_optimizer_state, optimizer_state


@dataclass
class TrainingState:
    """Everything that changes while a run trains, but for its position.

    parameters: the trained ones by name, in the optimizer's order.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    scaler: Any | None = None  # torch.amp.GradScaler
    ema: Ema | None = None

    def checkpoint(self, step: int, identity: dict[str, Any], position: dict[str, Any]) -> Checkpoint:
        """The state after `step` optimizer steps; copies nothing: write or snapshot it before the next step."""
        tensors = {f"trainable/{name}": p.detach() for name, p in self.parameters.items()}
        moments, numbers = optimizer_state(self.optimizer, list(self.parameters))
        tensors |= {f"optimizer/{name}": value for name, value in moments.items()}
        others: dict[str, Any] = {"optimizer": numbers}
        if self.scaler is not None:
            others["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            tensors |= {f"ema/{name}": value for name, value in self.ema.average.items()}
        return Checkpoint(step, identity, position, others, tensors)

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `checkpoint`. CheckpointError if the trained parameters are not the same ones."""
        stored = checkpoint.part("trainable")
        if stored.keys() != self.parameters.keys():
            odd = sorted(stored.keys() ^ self.parameters.keys())
            raise CheckpointError(
                f"checkpoint {checkpoint.name} trains other parameters: {', '.join(odd[:3])} (of {len(odd)}) are on "
                "one side only; use the same model and LoRA options, or --resume never"
            )
        for name, parameter in self.parameters.items():
            if stored[name].shape != parameter.shape:
                raise CheckpointError(
                    f"checkpoint {checkpoint.name}: {name} is {tuple(stored[name].shape)} there and "
                    f"{tuple(parameter.shape)} here; use the same model and LoRA options, or --resume never"
                )
            parameter.copy_(stored[name])
        load_optimizer_state(
            self.optimizer, list(self.parameters), checkpoint.part("optimizer"), checkpoint.numbers["optimizer"]
        )
        if self.scaler is not None and "scaler" in checkpoint.numbers:
            self.scaler.load_state_dict(checkpoint.numbers["scaler"])
        if self.ema is not None:
            self.ema.load(checkpoint.part("ema"))
