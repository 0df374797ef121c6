"""The values of one parameter in the samples of a batch, joined to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ray_diffsynth.pipelines.core.errors import PipelineError


def pad_and_mask(values: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Join tensors (1, L_i, D) to (B, L, D), padded with zeros at the end, and the mask of what is not padding.

    The mask is bool (B, L), or None if all L_i are equal: diffusers' models take a faster path then.
    """
    lengths = [value.shape[1] for value in values]
    longest = max(lengths)
    if min(lengths) == longest:
        return torch.cat(list(values)), None
    joined = values[0].new_zeros(len(values), longest, *values[0].shape[2:])
    mask = torch.zeros(len(values), longest, dtype=torch.bool, device=values[0].device)
    for index, value in enumerate(values):
        joined[index, : lengths[index]] = value[0]
        mask[index, : lengths[index]] = True
    return joined, mask


def collate(name: str, values: list[Any], *, is_setting: bool) -> Any:
    """Tensors along axis 0, a setting as the one value that it has, anything else as a list. Raises PipelineError."""
    if all(isinstance(value, Tensor) for value in values):
        shapes = {tuple(value.shape[1:]) for value in values}
        if len(shapes) > 1:
            raise PipelineError(
                f"{name!r} has differing shapes in one batch: {sorted(shapes)}; a batch must hold one size "
                f"(one bucket), or the family must list {name!r} in padded_params"
            )
        return torch.cat(values)
    if all(value is None for value in values):
        return None
    if is_setting:
        if any(value != values[0] for value in values[1:]):
            raise PipelineError(f"the setting {name!r} differs within one batch: {values}")
        return values[0]
    return values
