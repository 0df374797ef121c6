"""Tiled encoding and decoding of diffusers' causal 3-D VAEs (Qwen-Image, Wan)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TILING_VERSION = 1
"""Of how these VAEs work in tiles; raise it when that gives other latents."""


@contextmanager
def vae_tiling(vae: Any, tiled: bool, size: int, stride: int) -> Iterator[None]:
    """Let the VAE work in tiles of `size` pixels at every `stride` pixels, for this block only."""
    sides = ("min_height", "min_width", "stride_height", "stride_width")
    names = ("use_tiling", *(f"tile_sample_{side}" for side in sides))
    before = {name: getattr(vae, name) for name in names}
    if tiled:
        vae.enable_tiling(size, size, stride, stride)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
