"""FLUX.2-klein under the conformance suite: the text encoder has the 27 layers that the embedding needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor

from tests.families.cases import PROMPTS, FamilyCase, Sampling, image_row
from tests.families.tiny.parts import kl_vae_settings, qwen3, qwen_chat_tokenizer, seeded

TOKENS = 64  # instead of 512: an eighth of the time
SIZE = {"height": 32, "width": 48, "num_inference_steps": 3, "prompt": PROMPTS[1], "max_sequence_length": TOKENS}


def build(folder: Path) -> Path:
    """Write the model; the same bytes each time."""
    tokenizer = qwen_chat_tokenizer()
    with seeded():
        vae = AutoencoderKLFlux2(**kl_vae_settings(4))
        vae.bn.running_mean.normal_(0, 0.3)
        vae.bn.running_var.uniform_(0.5, 2)
        Flux2KleinPipeline(
            transformer=Flux2Transformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=48,
                timestep_guidance_channels=256,
                axes_dims_rope=[4, 4, 4, 4],
                guidance_embeds=False,
            ),
            vae=vae,
            text_encoder=qwen3(tokenizer, layers=28, causal_lm=True),
            tokenizer=tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        ).save_pretrained(folder)
    return folder


def latents(pipe: Any, output: Tensor) -> Tensor:
    """Their output is in the VAE's own latents: patchify and normalise it again."""
    patches = pipe._patchify_latents(output)
    mean, variance = (getattr(pipe.vae.bn, f"running_{name}").view(1, -1, 1, 1) for name in ("mean", "var"))
    normal: Tensor = (patches - mean) / (variance + pipe.vae.config.batch_norm_eps).sqrt()
    return normal


def encode(pipe: Any, row: Mapping[str, Any]) -> Mapping[str, Tensor]:
    pixels = pipe.image_processor.preprocess(row["input_image"], height=32, width=48)
    embeds, _ = pipe.encode_prompt(row["prompt"], max_sequence_length=TOKENS)
    return {"input_latents": pipe._encode_vae_image(pixels, None), "prompt_embeds": embeds}


CASE = FamilyCase(
    family="flux2",
    diffusers_pipeline="Flux2KleinPipeline",
    build=build,
    groups={"vae": ("input_latents",), "text_encoder": ("prompt_embeds",)},
    latents=latents,
    encode=encode,
    samplings=(
        Sampling({**SIZE, "cfg_scale": 1.0}, {**SIZE, "guidance_scale": 1.0}),
        Sampling({**SIZE, "cfg_scale": 4.0}, {**SIZE, "guidance_scale": 4.0}),
    ),
    inputs=image_row,
    settings={"max_sequence_length": TOKENS},
)
