"""Tiled encoding and decoding, of diffusers' causal 3-D VAEs (Qwen-Image, Wan) and of its AutoencoderKL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CAUSAL_VAE_TILING_VERSION = 1
"""Of how the causal VAEs work in tiles; raise it when that gives other latents."""
KL_VAE_TILING_VERSION = 1
"""The same of AutoencoderKL."""


@contextmanager
def causal_vae_tiling(vae: Any, tiled: bool, size: int, stride: int) -> Iterator[None]:
    """Let a causal VAE work in tiles of `size` pixels at every `stride` pixels, for this block only."""
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


@contextmanager
def kl_vae_tiling(vae: Any, tiled: bool, size: int, stride: int) -> Iterator[None]:
    """Let diffusers' AutoencoderKL work in tiles of `size` latents at every `stride` latents, for this block only."""
    wanted: dict[str, Any] = {
        "use_tiling": tiled,
        "tile_latent_min_size": size,
        "tile_sample_min_size": size * kl_scale_factor(vae.config),
        "tile_overlap_factor": 1 - stride / size,
    }
    before = {name: getattr(vae, name) for name in wanted}
    for name, value in wanted.items():
        setattr(vae, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def kl_scale_factor(config: Any) -> int:
    """Pixels a latent of an AutoencoderKL, each way, from its configuration."""
    return int(2 ** (len(config["block_out_channels"]) - 1))
