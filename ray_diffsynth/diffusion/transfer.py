"""From the CPU to a GPU without waiting for what the GPU still computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, device


def to_device(value: Tensor, where: device) -> Tensor:
    """`value.to(where)`; on its way to a GPU by pinned memory, so that the CPU goes on at once."""
    if value.device.type == "cpu" and where.type == "cuda":
        value = value.pin_memory()  # nothing to do if it is
    return value.to(where, non_blocking=value.is_pinned())


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `change` applied to it, or to each tensor in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return {key: map_tensors(change, item) for key, item in value.items()} if type(value) is dict else value


def pinned(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with their tensors in pinned memory, for `to_device`; for a thread that has the time."""
    return {name: map_tensors(Tensor.pin_memory, value) for name, value in values.items()}
