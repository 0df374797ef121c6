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


def moved(value: Any, where: device) -> Any:
    """`value` with all its tensors at `where`."""
    return map_tensors(lambda tensor: to_device(tensor, where), value)


def pinned(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with their tensors in pinned memory, for `to_device`; for a thread that has the time."""
    return {name: map_tensors(Tensor.pin_memory, value) for name, value in values.items()}


def as_stored(value: Any) -> Any:
    """`value` with its tensors as they come back from a cache: contiguous, by the order of their axes.

    Other strides may take another kernel, whose last bits differ.
    """
    return map_tensors(_plain, value)


def _plain(value: Tensor) -> Tensor:
    whole = value.detach().resolve_conj().resolve_neg().contiguous()
    return whole.view(-1).view(whole.shape)
