"""The optimizer and its state as named tensors, so that a checkpoint does not depend on the order of parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from ray_diffsynth.config.optimizer import OptimizerConfig
from ray_diffsynth.config.schedule import ScheduleConfig
from ray_diffsynth.errors import UserError
from ray_diffsynth.pipelines.own_module import describe_failure, import_from_working_folder
from ray_diffsynth.training.lr_schedules import LR_SCHEDULES

LearningRate = Callable[[int], float]
"""Optimizer step (from 0) -> learning rate. A pure function, so that resume needs no state for it."""


class OptimizerError(UserError):
    """An optimizer that cannot be made, or whose state cannot be kept."""


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """AdamW, fused on CUDA; or `config.customized_optimizer`, whose own defaults hold for what is not given.

    Raises OptimizerError.
    """
    found = list(parameters)
    if config.customized_optimizer is None:
        settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        settings |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
        return AdamW(found, **settings, fused=all(p.is_cuda for p in found))
    cls, arguments = customized(config.customized_optimizer, config)
    try:
        return cls(found, **arguments)
    except (TypeError, ValueError) as error:
        raise OptimizerError(
            f"--customized_optimizer {config.customized_optimizer}: {error}; see --optimizer_arguments"
        ) from error


def customized(path: str, config: OptimizerConfig) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class that an import path names, and what it is called with. Raises OptimizerError for an option that it does
    not take, and one that it cannot do without.
    """
    cls = optimizer_class(path)
    known = inspect.signature(cls).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    arguments = dict(config.optimizer_arguments or {})
    for name, option in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        value = getattr(config, option)
        if value is None:
            if name in known and known[name].default is inspect.Parameter.empty and name not in arguments:
                raise OptimizerError(f"--{option} is missing: --customized_optimizer {path} has no default of its own")
        elif name in known or anything:
            arguments[name] = value
        else:
            raise OptimizerError(
                f"--{option} is given, but --customized_optimizer {path} takes no {name}; leave it out"
            )
    return cls, arguments


def optimizer_class(path: str) -> type[Optimizer]:
    """What an import path names, `module:Class`, also of a module in the working folder. Raises OptimizerError."""
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found: object = getattr(import_from_working_folder(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptimizerError(
            f"--customized_optimizer {path} cannot be imported: {error}; install its package, or put its module into "
            "the working folder"
        ) from error
    except Exception as error:  # it runs the user's own code
        raise OptimizerError(
            f"--customized_optimizer {path} cannot be imported: {describe_failure(error)}; mend it there"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise OptimizerError(f"--customized_optimizer {path} is no subclass of torch.optim.Optimizer; name another")
    return found


def base_learning_rate(optimizer: Optimizer, config: OptimizerConfig) -> float:
    """What the schedule scales: the option, or the optimizer's own default. Ask before a checkpoint is restored."""
    if config.learning_rate is not None:
        return config.learning_rate
    return float(optimizer.param_groups[0].get("lr", 0.0))


def learning_rate(config: ScheduleConfig, total: int, base: float) -> LearningRate:
    """The learning rate of each of `total` steps by ``--lr_scheduler``, as a pure function."""
    factor = LR_SCHEDULES[config.lr_scheduler].make(config.lr_warmup_steps, total, base)
    return lambda step: base * factor(step)


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
