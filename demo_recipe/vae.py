"""The VAE: Qwen-Image's class, small, run on single frames.

On one frame only the last temporal tap of a causal 3×3×3 convolution meets anything but padding, so the recipe runs
that tap as a 2-D convolution (a third of the work) and the other taps stay zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen_vae
from torch import Tensor, nn

from demo_recipe.encoder import CHANNELS, write_encoder
from ray_diffsynth.demo.draw import Pixels, draw_image


def build_vae(pixels: Pixels, seed: int) -> AutoencoderKLQwenImage:
    """A VAE, 8× down and 16 latent channels: the encoder fitted to (N, H, W, 3) images, the decoder random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=CHANNELS,
            dim_mult=[1, 2, 4, 6],
            num_res_blocks=1,
            temperal_downsample=[False, False, False],
            latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
        )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
                module.weight[:, :, :2].zero_()
                module.weight.mul_(3.0)  # PyTorch's default deviation counts the two dead taps and a gain of 1/√3
            elif isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.mul_(3.0**0.5)
    write_encoder(vae, pixels, seed)
    return vae


def _conv(self: Any, x: Tensor, cache_x: None = None) -> Tensor:
    left, _, top, *_ = self._padding
    out = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], (top, left))
    return out.unsqueeze(2)


def _norm(self: Any, x: Tensor) -> Tensor:
    scale = torch.rsqrt((x * x).sum(1, keepdim=True) + 1e-12) * self.scale
    out: Tensor = x * scale * self.gamma
    return out


def _resample(self: Any, x: Tensor, feat_cache: None = None, feat_idx: list[int] | None = None) -> Tensor:
    out: Tensor = self.resample(x[:, :, 0])
    return out.unsqueeze(2)


@contextmanager
def single_frame() -> Iterator[None]:
    """Within this context the VAE's layers compute the same for one frame, faster, and refuse nothing else."""
    with ExitStack() as stack:
        for cls, forward in (
            (qwen_vae.QwenImageCausalConv3d, _conv),
            (qwen_vae.QwenImageRMS_norm, _norm),
            (qwen_vae.QwenImageResample, _resample),
        ):
            stack.enter_context(patch.object(cls, "forward", forward))
        yield


def to_tensor(pixels: list[Pixels] | Pixels) -> Tensor:
    """Pixels (B, H, W, 3) uint8 → (B, 3, 1, H, W) float32 in [−1, 1]."""
    return torch.from_numpy(np.stack(list(pixels))).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).unsqueeze(2)


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, pixels: list[Pixels] | Pixels, batch: int = 64) -> Tensor:
    """The posterior's mean, not normalised: (B, 16, H/8, W/8)."""
    with single_frame():
        parts = [to_tensor(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]
        return torch.cat([vae.quant_conv(vae.encoder(x))[:, :16, 0] for x in parts])


@torch.no_grad()
def decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> Pixels:
    """Latents as `encode` returns them → pixels (B, H, W, 3) uint8."""
    with single_frame():
        out = vae.decoder(vae.post_quant_conv(latents.unsqueeze(2)))[:, :, 0].clamp(-1, 1)
    return np.asarray(out.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy())


def psnr(vae: AutoencoderKLQwenImage, pixels: list[Pixels]) -> float:
    """Mean over images of the peak signal-to-noise ratio of decode(encode(x)) in dB."""
    again = decode(vae, encode(vae, pixels)).astype(np.float64)
    error = ((np.stack(pixels) - again) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255.0**2 / error)).mean())


def held_out_images(n: int = 32) -> dict[str, list[Pixels]]:
    """Images that no stage trains on, by kind."""
    return {
        "shapes": [draw_image(901, i).pixels for i in range(n)],
        "creature": [draw_image(902, i, kind="creature").pixels for i in range(n)],
        "style": [draw_image(903, i, kind="style").pixels for i in range(n)],
    }
