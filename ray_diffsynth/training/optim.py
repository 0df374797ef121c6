"""The optimizer and its state as named tensors, so that a checkpoint does not depend on the order of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

LearningRate = Callable[[int], float]
"""Optimizer step (from 0) -> learning rate. A pure function, so that resume needs no state for it."""


def make_optimizer(parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> Optimizer:
    """AdamW with torch's betas and epsilon, fused on CUDA."""
    found = list(parameters)
    return AdamW(found, lr=lr, weight_decay=weight_decay, fused=all(p.is_cuda for p in found))


def constant(lr: float) -> LearningRate:
    """The same learning rate at every step."""
    return lambda step: lr


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(optimizer: Optimizer, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors by `<parameter>/<entry>`, the rest as JSON values). names: of the parameters, in its order."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for entry, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[number]}/{entry}"] = value
            else:
                entries.setdefault(names[number], {})[entry] = value
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return tensors, {"entries": entries, "groups": groups}


def load_optimizer_state(
    optimizer: Optimizer, names: list[str], tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]
) -> None:
    """Inverse of `optimizer_state`."""
    number_of = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        state.setdefault(number_of[name], {})[entry] = value
    for name, values in numbers["entries"].items():
        state.setdefault(number_of[name], {}).update(values)
    groups = [
        {name: tuple(v) if name == "betas" else v for name, v in group.items()}
        | {"params": [number_of[name] for name in group["params"]]}
        for group in numbers["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
