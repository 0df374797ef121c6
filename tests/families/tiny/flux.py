"""FLUX.1-dev under the conformance suite: one double and two single blocks, with the guidance embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from tests.families.cases import PROMPTS, FamilyCase, Sampling, image_row
from tests.families.tiny.parts import clip_text, clip_tokenizer, kl_vae_settings, seeded, t5_encoder, t5_tokenizer

TOKENS = 64  # instead of 512: an eighth of the time
SIZE = {"height": 32, "width": 48, "num_inference_steps": 3, "prompt": PROMPTS[1], "max_sequence_length": TOKENS}


def build(folder: Path) -> Path:
    """Write the model; the same bytes each time."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    with seeded():
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
            guidance_embeds=True,
        )
        FluxPipeline(
            transformer=transformer,
            vae=AutoencoderKL(**kl_vae_settings(4), scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=clip_text(tokenizer),
            text_encoder_2=t5_encoder(tokenizer_2),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15
            ),
        ).save_pretrained(folder)
    return folder


def latents(pipe: Any, output: Tensor) -> Tensor:
    unpacked: Tensor = pipe._unpack_latents(output, 32, 48, pipe.vae_scale_factor)
    return unpacked


def encode(pipe: Any, row: Mapping[str, Any]) -> Mapping[str, Tensor]:
    z = pipe.vae.encode(pipe.image_processor.preprocess(row["input_image"])).latent_dist.mode()
    embeds, pooled, _ = pipe.encode_prompt(row["prompt"], None, max_sequence_length=TOKENS)
    return {
        "input_latents": (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor,
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
    }


CASE = FamilyCase(
    family="flux",
    diffusers_pipeline="FluxPipeline",
    build=build,
    groups={
        "vae": ("input_latents",),
        "text_encoder": ("pooled_prompt_embeds",),
        "text_encoder_2": ("prompt_embeds",),
    },
    latents=latents,
    encode=encode,
    samplings=(
        Sampling({**SIZE, "embedded_guidance": 2.5}, {**SIZE, "guidance_scale": 2.5}),
        Sampling(
            {**SIZE, "negative_prompt": "ugly, blurred", "cfg_scale": 4.0},
            {**SIZE, "negative_prompt": "ugly, blurred", "true_cfg_scale": 4.0},
        ),
    ),
    inputs=image_row,
    settings={"max_sequence_length": TOKENS},
)
