"""A random-weight model of the Qwen-Image architecture in the standard diffusers layout, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from ray_diffsynth.demo.draw import draw_dataset
from ray_diffsynth.demo.text_encoder import HIDDEN_SIZE, build_text_encoder
from ray_diffsynth.demo.tokenizer import build_tokenizer

__all__ = ["build_scheduler", "build_tiny_model", "draw_dataset"]

LATENT_CHANNELS = 16


def build_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's sampler with one shift for every size: σ' = e^shift·σ / (1 + (e^shift − 1)·σ)."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        shift_terminal=0.02,
        base_shift=shift,
        max_shift=shift,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        time_shift_type="exponential",
    )


def build_tiny_model(folder: str | Path, seed: int = 0) -> Path:
    """Write a random-weight model that QwenImagePipeline.from_pretrained loads without a network; returns its folder.

    The VAE has the real geometry (8× downsampling, 16 latent channels, so sides are multiples of 16) and latent
    statistics that are neither 0 nor 1. The same seed writes the same bytes; no global generator moves.
    """
    root = Path(folder)
    tokenizer = build_tokenizer()
    statistics = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=4 * LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=HIDDEN_SIZE,
            guidance_embeds=False,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[round(v, 4) for v in (torch.rand(LATENT_CHANNELS, generator=statistics) - 0.5).tolist()],
            latents_std=[round(v, 4) for v in (torch.rand(LATENT_CHANNELS, generator=statistics) + 0.5).tolist()],
        )
    QwenImagePipeline(
        scheduler=build_scheduler(shift=1.0),
        vae=vae.eval(),
        text_encoder=build_text_encoder(tokenizer, seed=seed),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    ).save_pretrained(root, safe_serialization=True)
    return root
