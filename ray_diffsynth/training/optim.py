"""The optimizer and its state as named tensors, so that a checkpoint does not depend on the order of parameters."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.errors import UserError

LearningRate = Callable[[int], float]
"""Optimizer step (from 0) -> learning rate. A pure function, so that resume needs no state for it."""


class OptimizerError(UserError):
    """An optimizer that cannot be made, or whose state cannot be kept."""


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """AdamW, fused on CUDA; or `config.customized_optimizer`. Raises OptimizerError."""
    found = list(parameters)
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.customized_optimizer is None:
        betas = (config.adam_beta1, config.adam_beta2)
        return AdamW(found, **settings, betas=betas, eps=config.adam_epsilon, fused=all(p.is_cuda for p in found))
    path = config.customized_optimizer
    cls = optimizer_class(path)
    known = inspect.signature(cls).parameters
    own = {name: value for name, value in settings.items() if name in known}
    try:
        return cls(found, **{**own, **(config.optimizer_arguments or {})})
    except (TypeError, ValueError) as error:
        raise OptimizerError(f"--customized_optimizer {path}: {error}; see --optimizer_arguments") from error


def optimizer_class(path: str) -> type[Optimizer]:
    """What an import path names, `module:Class`. Raises OptimizerError."""
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found: object = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptimizerError(
            f"--customized_optimizer {path} cannot be imported: {error}; install its package"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise OptimizerError(f"--customized_optimizer {path} is no subclass of torch.optim.Optimizer; name another")
    return found


def learning_rate(config: TrainConfig, total: int) -> LearningRate:
    """The schedule of diffusers (`diffusers.optimization.get_scheduler`) over `total` steps, as a pure function."""
    if config.lr_scheduler == "constant":
        return lambda step: config.learning_rate
    from diffusers.optimization import get_scheduler

    # Its factors do not depend on the optimizer, which it wants all the same.
    holder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler, holder, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total
    )
    (factor,) = schedule.lr_lambdas
    return lambda step: config.learning_rate * float(factor(step))


def depends_on_length(config: TrainConfig) -> bool:
    """Whether the learning rate of a step depends on how many steps the run has."""
    return not config.lr_scheduler.startswith("constant")


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
                entries.setdefault(names[number], {})[entry] = _json(value, entry)
    groups = [
        {**{name: _json(value, name) for name, value in group.items()}, "params": [names[i] for i in group["params"]]}
        for group in state["param_groups"]
    ]
    return tensors, {"entries": entries, "groups": groups}


def _json(value: Any, name: str) -> Any:
    """`value` if a checkpoint can hold it: JSON values only."""
    if isinstance(value, (list, tuple)):
        return [_json(item, name) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise OptimizerError(
        f"the optimizer keeps a {type(value).__name__} as {name!r}, which a checkpoint cannot hold; use another one"
    )


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
        {name: tuple(v) if isinstance(v, list) else v for name, v in group.items()}
        | {"params": [number_of[name] for name in group["params"]]}
        for group in numbers["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
