"""Latents <-> tokens of 2 x 2 neighbours, and the positions of tokens on a grid."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_latents(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> tokens (B, h/2 * w/2, 4C): 2 x 2 neighbours in one token."""
    return patchify(latents).flatten(2).transpose(1, 2)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack_latents`; `height` and `width` are those of the latents."""
    cells = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height // 2, width // 2)
    return unpatchify(cells)


def patchify(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 4C, h/2, w/2): channel c of the cell (y, x) goes to 4c + 2y + x."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels * 4, height // 2, width // 2)


def unpatchify(latents: Tensor) -> Tensor:
    """Inverse of `patchify`."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels // 4, 2, 2, height, width)
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // 4, height * 2, width * 2)


def grid_positions(*sizes: int, device: torch.device | None = None) -> Tensor:
    """Positions (N, len(sizes)) of the cells of a grid, the last axis fastest; fp32, exact for any image."""
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in sizes]
    return torch.cartesian_prod(*axes).reshape(-1, len(sizes))
