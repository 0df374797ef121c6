"""Training of the VAE's decoder on the latents of its fixed encoder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

from demo_recipe.state import TrainingState, scheduled_rate
from demo_recipe.vae import encode, held_out_images, psnr, single_frame, to_tensor
from ray_diffsynth.demo.draw import Pixels

logger = logging.getLogger("demo_recipe")


@dataclass(frozen=True)
class DecoderConfig:
    """Training of the decoder: `crop_steps` steps on crops of 32×32 pixels, then half as many whole images a step.

    The rate warms up, stays, and falls in a straight line over the last `cool` steps; over the last `settle` steps the
    loss goes over from sharp edges to small squares, that is to a high PSNR.
    """

    seed: int = 0
    steps: int = 13_500
    crop_steps: int = 2_250
    cool: int = 3_000
    settle: int = 1_250
    batch: int = 8
    learning_rate: float = 3e-3
    warmup: int = 50
    noise: float = 0.05  # added to the latents, in units of their own deviation
    average_decay: float = 0.99


def decoder_loss(decoder: nn.ModuleList, latents: Tensor, x: Tensor, sharp: float = 1.0) -> Tensor:
    """4·L2 + sharp·(L1 + ½·L1 of neighbour differences). latents: (B, 16, 1, h, w); x: (B, 3, 1, 8h, 8w) in [−1, 1]."""
    d = decoder[1](decoder[0](latents)) - x
    edges = d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
    loss: Tensor = 4 * d.square().mean() + sharp * (d.abs().mean() + 0.5 * edges)
    return loss


def _batch(pixels: Pixels, latents: Tensor, config: DecoderConfig, step: int) -> tuple[Tensor, Tensor]:
    """Latents and pixels of a step, a function of (seed, step)."""
    rng = np.random.default_rng([config.seed, step, 2])
    whole = step >= config.crop_steps
    side, count = (8, config.batch // 2) if whole else (4, config.batch)
    chosen = rng.integers(0, len(pixels), count)
    corners = rng.integers(0, 9 - side, (count, 2))
    z = torch.stack([latents[i, :, y : y + side, x : x + side] for i, (y, x) in zip(chosen, corners, strict=True)])
    z = z + config.noise * torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32)) * latents.std()
    crops = [
        pixels[i, 8 * y : 8 * (y + side), 8 * x : 8 * (x + side)] for i, (y, x) in zip(chosen, corners, strict=True)
    ]
    return z.unsqueeze(2), to_tensor(crops)


def train_decoder(
    folder: Path, vae: AutoencoderKLQwenImage, pixels: Pixels, config: DecoderConfig, look: Callable[[int], None]
) -> None:
    """Train, or go on training, the decoder of `vae` in place with its state in `folder`.

    Before each `look(step)`, every 500 steps and after the last, `vae` holds the running average of the weights.
    """
    average = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(False)
    decoder = copy.deepcopy(average).requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    latents, held_out = encode(vae, pixels), held_out_images()
    state = TrainingState(folder, decoder, average, {"adamw": optimizer})
    for step in state.steps(config.steps, save_every=250):
        rate = scheduled_rate(
            step, peak=config.learning_rate, warmup=config.warmup, steps=config.steps, cool=config.cool
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        sharp = max(0.1, min(1.0, (config.steps - step) / config.settle))
        with single_frame():
            loss = decoder_loss(decoder, *_batch(pixels, latents, config, step), sharp)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        state.update_average(config.average_decay)
        if step % 100 == 0:
            logger.info("decoder %d loss %.4f %.0f s", step, loss.item(), state.seconds)
        if step % 500 == 499 or step + 1 == config.steps:
            logger.info(
                "decoder %d %s", step + 1, {kind: round(psnr(vae, shown), 2) for kind, shown in held_out.items()}
            )
            look(step + 1)
