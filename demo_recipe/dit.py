"""The DiT: Qwen-Image's class, small, trained by flow matching on precomputed latents and embeddings."""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn

from demo_recipe.latents import Latents
from demo_recipe.state import TrainingState, scheduled_rate

logger = logging.getLogger("demo_recipe")


@dataclass(frozen=True)
class DitConfig:
    """Training of the DiT with AdamW: warm-up, constant rate, then a straight line down over the last `cool` steps."""

    seed: int = 20
    layers: int = 4
    heads: int = 4
    head_dim: int = 32
    steps: int = 6_000
    cool: int = 1_500
    batch: int = 32
    learning_rate: float = 1.5e-3
    warmup: int = 150
    drop_caption: float = 0.1
    shift: float = 3.0
    average_decay: float = 0.998


def build_dit(config: DitConfig, hidden_size: int) -> QwenImageTransformer2DModel:
    """A fresh DiT whose blocks and output start as zero (adaLN-zero, Peebles & Xie 2022)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        dit = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=config.layers,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.heads,
            joint_attention_dim=hidden_size,
            guidance_embeds=False,
            axes_dims_rope=(4, 14, 14) if config.head_dim == 32 else (config.head_dim - 28, 14, 14),
        )
    zero = [dit.proj_out, dit.norm_out.linear]
    zero += [module[1] for block in dit.transformer_blocks for module in (block.img_mod, block.txt_mod)]
    for layer in zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return dit


def velocity(dit: nn.Module, latents: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
    """The model's noise − clean for latents (B, 16, H, W), sigma (B,) and prompts of one length (B, length, hidden)."""
    b, c, h, w = latents.shape
    packed = QwenImagePipeline._pack_latents(latents, b, c, h, w)
    out = dit(
        hidden_states=packed,
        timestep=sigma,
        encoder_hidden_states=embeds,
        img_shapes=[[(1, h // 2, w // 2)]] * b,
        return_dict=False,
    )[0]
    unpacked: Tensor = QwenImagePipeline._unpack_latents(out, 8 * h, 8 * w, 8)
    return unpacked.squeeze(2)


def flow_loss(dit: nn.Module, latents: Tensor, embeds: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity at sigma = shift·u / (1 + (shift − 1)·u), u uniform and stratified."""
    n = len(latents)
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    sigma = shift * u / (1 + (shift - 1) * u)
    noise = torch.randn(latents.shape, generator=generator)
    s = sigma.view(-1, 1, 1, 1)
    return F.mse_loss(velocity(dit, (1 - s) * latents + s * noise, sigma, embeds), noise - latents)


class Batches:
    """Batches as a function of (seed, step). All captions of a batch have one length, so that no mask is needed."""

    def __init__(self, data: Latents, config: DitConfig) -> None:
        self.data, self.config = data, config
        self.pools: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for image, row in enumerate(data.captions.tolist()):
            for prompt in row:
                self.pools[len(data.embeds[prompt])].append((image, prompt))
        sizes = np.array([len(pool) for pool in self.pools.values()], dtype=np.float64)
        self.shares = sizes / sizes.sum()

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents (B, 16, 8, 8) and embeddings (B, length, hidden)."""
        rng = np.random.default_rng([self.config.seed, step])
        pool = self.pools[list(self.pools)[int(rng.choice(len(self.shares), p=self.shares))]]
        chosen = [pool[i] for i in rng.integers(0, len(pool), self.config.batch)]
        dropped = rng.random() < self.config.drop_caption
        embeds = torch.stack([self.data.embeds[0 if dropped else prompt] for _, prompt in chosen])
        return self.data.latents[[image for image, _ in chosen]], embeds


def rate(step: int, config: DitConfig) -> float:
    """The learning rate of a step; it ends at a hundredth."""
    return scheduled_rate(step, peak=config.learning_rate, warmup=config.warmup, steps=config.steps, cool=config.cool)


def train_dit(
    folder: Path,
    data: Latents,
    config: DitConfig,
    look: Callable[[QwenImageTransformer2DModel, int], None],
    look_every: int,
) -> QwenImageTransformer2DModel:
    """Train, or go on training, the DiT with its state in `folder`; returns the running average of the weights.

    `look(average, step)` is called every `look_every` steps and after the last.
    """
    dit = build_dit(config, data.embeds[0].shape[-1])
    average = copy.deepcopy(dit).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(dit.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    state = TrainingState(folder, dit, average, {"adamw": optimizer})
    batches, smooth = Batches(data, config), math.nan
    for step in state.steps(config.steps, save_every=250):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, config)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        latents, embeds = batches(step)
        loss = flow_loss(dit, latents, embeds, config.shift, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
        state.update_average(config.average_decay)
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            logger.info("dit %d loss %.4f %.0f s", step, smooth, state.seconds)
        if (step + 1) % look_every == 0 or step + 1 == config.steps:
            look(average, step + 1)
    return average
