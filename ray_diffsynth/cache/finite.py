"""Whether values hold numbers that are not finite: tensors, arrays and floats, however deep in lists and dicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


def all_finite(values: Sequence[Any]) -> list[bool]:
    """For each value whether no number in it is NaN or infinite. Waits once for each device that holds tensors."""
    found = [True] * len(values)
    flags: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for place, value in enumerate(values):
        for leaf in _leaves(value):
            if isinstance(leaf, float):
                found[place] &= math.isfinite(leaf)
            else:
                flags.setdefault(leaf.device, []).append((place, torch.isfinite(leaf).all()))
    for entries in flags.values():
        verdicts = torch.stack([flag for _, flag in entries]).tolist()
        for (place, _), verdict in zip(entries, verdicts, strict=True):
            found[place] &= verdict
    return found


def is_finite(value: Any) -> bool:
    """Whether no number in a value is NaN or infinite."""
    return all_finite([value])[0]


def _leaves(value: Any) -> Iterator[torch.Tensor | float]:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fc":
        yield 0.0 if np.isfinite(value).all() else math.nan
    elif isinstance(value, float):
        yield value
    elif isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
        # Not every 8-bit type knows isfinite; all convert to fp32.
        yield value.float() if value.is_floating_point() and value.itemsize == 1 else value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
