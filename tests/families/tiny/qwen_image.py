"""Qwen-Image under the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.families.cases import PROMPTS, FamilyCase, Sampling, image_row
from tests.tiny_models import tiny_qwen_image

SIZE = {"height": 32, "width": 48, "num_inference_steps": 3}


def latents(pipe: Any, output: Tensor) -> Tensor:
    """Packed tokens of a 32x48 image -> (1, C, 4, 6)."""
    unpacked: Tensor = pipe._unpack_latents(output, 32, 48, pipe.vae_scale_factor)
    return unpacked[:, :, 0]


def encode(pipe: Any, row: Mapping[str, Any]) -> Mapping[str, Tensor]:
    pixels = pipe.image_processor.preprocess(row["input_image"])
    z = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
    embeds, mask = pipe.encode_prompt(row["prompt"])
    assert mask is None
    return {"input_latents": (z - mean) / std, "prompt_embeds": embeds}


CASE = FamilyCase(
    family="qwen_image",
    diffusers_pipeline="QwenImagePipeline",
    build=tiny_qwen_image,
    groups={"vae": ("input_latents",), "text_encoder": ("prompt_embeds",)},
    latents=latents,
    encode=encode,
    samplings=(
        Sampling(
            {"prompt": PROMPTS[1], "cfg_scale": 1.0, **SIZE}, {"prompt": PROMPTS[1], "true_cfg_scale": 1.0, **SIZE}
        ),
        Sampling(
            {"prompt": PROMPTS[1], "negative_prompt": "ugly, blurred", "cfg_scale": 4.0, **SIZE},
            {"prompt": PROMPTS[1], "negative_prompt": "ugly, blurred", "true_cfg_scale": 4.0, **SIZE},
        ),
    ),
    inputs=image_row,
)
