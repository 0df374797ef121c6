"""From the CPU to a GPU without waiting for what the GPU still computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, device


def to_device(value: Tensor, where: device) -> Tensor:
    """`value.to(where)`; on its way to a GPU by pinned memory, so that the CPU goes on at once."""
    if value.device.type == "cpu" and where.type == "cuda":
        value = value.pin_memory()  # nothing to do if it is
    return value.to(where, non_blocking=value.is_pinned())


def pinned(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with their tensors in pinned memory, for `to_device`; for a thread that has the time."""
    return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in values.items()}
