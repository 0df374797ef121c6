"""Optimizers by import path: one in the manner of schedulefree, and one with a mistake in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class ScheduleFreeSGD(Optimizer):
    """Schedule-free SGD (arXiv:2405.15682) as the package schedulefree has it: gradients are taken at y, what is meant
    is the average x, and z is the state. `eval()` puts x into the weights, `train()` y again.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1.0, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "k": 0, "train_mode": False})

    @torch.no_grad()
    def _switch(self, to_train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == to_train:
                continue
            momentum = group["momentum"]
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - momentum if to_train else 1 - 1 / momentum)
            group["train_mode"] = to_train

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("Optimizer was not in train mode when step is called.")
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "z" not in state:
                    state["z"] = p.clone()
                weight = 1 / group["k"]
                p.lerp_(state["z"], weight)
                p.add_(p.grad, alpha=group["lr"] * (group["momentum"] * (1 - weight) - 1))
                state["z"].sub_(p.grad, alpha=group["lr"])


class Broken(torch.optim.SGD):
    """Its third step fails, and would in each attempt."""

    steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        if self.steps == 3:
            raise LookupError("no such column: momentum_buffer_2")
        super().step(closure)
