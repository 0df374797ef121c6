"""Optimizers that train one set of weights and mean another (schedule-free): their `train()` and `eval()` switch.

Steps are done in training mode; what is written, measured or drawn is what the model has in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer


def has_modes(optimizer: Optimizer) -> bool:
    """Whether the optimizer has the two modes."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def to_training(optimizer: Optimizer) -> None:
    """Before the first step."""
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]


@contextmanager
def evaluated(optimizer: Optimizer) -> Iterator[None]:
    """Within it the model has the weights of evaluation mode.

    Afterwards weights and state are, bit for bit, what they were: switching there and back may round, and a run that
    was killed before it switched would end in other weights than one that was not.
    """
    if not has_modes(optimizer):
        yield
        return
    modes: Any = optimizer
    weights = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    state = {p: {name: _copy(value) for name, value in entries.items()} for p, entries in optimizer.state.items()}
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    modes.eval()
    try:
        yield
    finally:
        modes.train()
        with torch.no_grad():
            for parameter, value in weights:
                parameter.copy_(value)
        for parameter, entries in state.items():
            optimizer.state[parameter] = entries
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
