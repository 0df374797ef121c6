"""The VAE: Qwen-Image's class, small, trained on single frames.

On one frame only the last temporal tap of a causal 3×3×3 convolution meets anything but padding, so training runs that
tap as a 2-D convolution (a third of the work) and the other taps stay zero.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen_vae
from torch import Tensor, nn

from ray_diffsynth.demo.draw import Pixels, draw_picture
from ray_diffsynth.demo.recipe.generic import vae_picture
from ray_diffsynth.demo.recipe.state import TrainingState

logger = logging.getLogger("ray_diffsynth.demo.recipe")


@dataclass(frozen=True)
class VaeConfig:
    """Training of the VAE; crops of `crop` pixels until the last `full_steps` steps, which see whole pictures."""

    seed: int = 0
    base_dim: int = 8
    dim_mult: tuple[int, ...] = (1, 2, 4, 6)
    pictures: int = 6_000
    steps: int = 3_500
    full_steps: int = 200
    batch: int = 16
    crop: int = 32
    learning_rate: float = 3e-3
    warmup: int = 100
    kl_weight: float = 5e-4
    average_decay: float = 0.995


def build_vae(config: VaeConfig) -> AutoencoderKLQwenImage:
    """A fresh VAE, 8× downsampling and 16 latent channels, with the dead taps zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vae = AutoencoderKLQwenImage(
            base_dim=config.base_dim,
            z_dim=16,
            dim_mult=list(config.dim_mult),
            num_res_blocks=1,
            temperal_downsample=[False] * (len(config.dim_mult) - 1),
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
        )
    zero_dead_taps(vae)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
                module.weight.mul_(3.0)  # PyTorch's default deviation counts the two dead taps and a gain of 1/√3
            elif isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.mul_(3.0**0.5)
        vae.quant_conv.bias[16:] = -5.0  # log-variance of the posterior
    return vae


@torch.no_grad()
def zero_dead_taps(vae: nn.Module) -> None:
    """Zero the temporal taps that a single frame never reaches."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
            module.weight[:, :, :2].zero_()


def _conv(self: nn.Conv3d, x: Tensor, cache_x: None = None) -> Tensor:
    pad = self._padding  # type: ignore[attr-defined]  # (left, right, top, bottom, front, back)
    return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], (pad[2], pad[0])).unsqueeze(2)


def _norm(self: nn.Module, x: Tensor) -> Tensor:
    scale = torch.rsqrt((x * x).sum(1, keepdim=True) + 1e-12) * self.scale
    return x * scale * self.gamma  # type: ignore[operator]


def _resample(self: nn.Module, x: Tensor, feat_cache: None = None, feat_idx: list[int] | None = None) -> Tensor:
    out: Tensor = self.resample(x[:, :, 0])  # type: ignore[operator]
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
    """Mean over pictures of the peak signal-to-noise ratio of decode(encode(x)) in dB."""
    again = decode(vae, encode(vae, pixels)).astype(np.float64)
    error = ((np.stack(pixels) - again) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255.0**2 / error)).mean())


def test_pictures(n: int = 32) -> dict[str, list[Pixels]]:
    """Pictures that no stage trains on, by kind."""
    return {
        "shapes": [draw_picture(901, i).pixels for i in range(n)],
        "creature": [draw_picture(902, i, kind="creature").pixels for i in range(n)],
        "style": [draw_picture(903, i, kind="style").pixels for i in range(n)],
    }


def loss_fn(vae: AutoencoderKLQwenImage, x: Tensor, generator: torch.Generator, kl_weight: float) -> Tensor:
    """L1 + 4·L2 + ½·L1 of the neighbour differences + kl_weight·KL of the posterior to N(0, 1). x: (B, 3, 1, H, W)."""
    mean, log_var = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    log_var = log_var.clamp(-30, 20)
    z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator)
    d = vae.decoder(vae.post_quant_conv(z)) - x
    edges = d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    loss: Tensor = d.abs().mean() + 4 * d.square().mean() + 0.5 * edges + kl_weight * kl
    return loss


def _batch(pictures: Pixels, config: VaeConfig, step: int) -> Tensor:
    """The pictures of a step, a function of (seed, step): random crops, or whole ones at the end."""
    rng = np.random.default_rng([config.seed, step, 2])
    whole = step >= config.steps - config.full_steps
    side = pictures.shape[1] if whole else config.crop
    count = config.batch // 2 if whole else config.batch
    corners = rng.integers(0, pictures.shape[1] - side + 1, (count, 2))
    chosen = rng.integers(0, len(pictures), count)
    crops = [pictures[i, a : a + side, b : b + side] for i, (a, b) in zip(chosen, corners, strict=True)]
    return to_tensor([c[:, ::-1] if flip else c for c, flip in zip(crops, rng.random(count) < 0.5, strict=True)])


def _pictures(path: Path, config: VaeConfig) -> Pixels:
    """The training pictures (N, 64, 64, 3), drawn once and kept in `path`."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.stack([vae_picture(config.seed, i) for i in range(config.pictures)]), allow_pickle=False)
    return np.asarray(np.load(path, allow_pickle=False))


def train_vae(folder: Path, config: VaeConfig) -> AutoencoderKLQwenImage:
    """Train, or go on training, the VAE with its state in `folder`; returns the running average of the weights."""
    vae = build_vae(config)
    average = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    state = TrainingState(folder, vae, average, {"adamw": optimizer})
    pictures = _pictures(folder / "pictures.npy", config)
    held_out = test_pictures()
    for step in state.steps(config.steps, save_every=250):
        progress = step / config.steps
        decay = 0.5 * (1 + np.cos(np.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / config.warmup) * (0.01 + 0.99 * decay)
        with single_frame():
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            loss = loss_fn(vae, _batch(pictures, config, step), generator, config.kl_weight)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        state.update_average(config.average_decay)
        if step % 50 == 0:
            logger.info("vae %d loss %.4f %.0f s", step, loss.item(), state.seconds)
        if step % 500 == 0 or step + 1 == config.steps:
            figures = {kind: round(psnr(average, shown), 1) for kind, shown in held_out.items()}
            logger.info("vae %d loss %.4f %.0f s %s", step, loss.item(), state.seconds, figures)
    zero_dead_taps(average)
    return average
