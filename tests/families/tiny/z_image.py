"""Z-Image under the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor

from tests.families.cases import PROMPTS, FamilyCase, Sampling, image_row
from tests.families.tiny.parts import kl_vae_settings, qwen3, qwen_chat_tokenizer, seeded

SIZE = {"height": 32, "width": 48, "num_inference_steps": 3, "prompt": PROMPTS[1]}


def build(folder: Path) -> Path:
    """Write the model; the same bytes each time."""
    tokenizer = qwen_chat_tokenizer()
    with seeded():
        transformer = ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
        with torch.no_grad():  # zeros after their making: then padding would not matter
            transformer.x_pad_token.normal_()
            transformer.cap_pad_token.normal_()
        ZImagePipeline(
            transformer=transformer,
            vae=AutoencoderKL(**kl_vae_settings(4), scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=qwen3(tokenizer, layers=3, causal_lm=False),
            tokenizer=tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)
    return folder


def latents(pipe: Any, output: Tensor) -> Tensor:
    return output


def encode(pipe: Any, row: Mapping[str, Any]) -> Mapping[str, Tensor]:
    z = pipe.vae.encode(pipe.image_processor.preprocess(row["input_image"])).latent_dist.mode()
    embeds, _ = pipe.encode_prompt([row["prompt"]], do_classifier_free_guidance=False)
    return {
        "input_latents": (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor,
        "prompt_embeds": embeds[0][None],
    }


CASE = FamilyCase(
    family="z_image",
    diffusers_pipeline="ZImagePipeline",
    build=build,
    groups={"vae": ("input_latents",), "text_encoder": ("prompt_embeds",)},
    latents=latents,
    encode=encode,
    samplings=(
        Sampling({**SIZE, "cfg_scale": 1.0}, {**SIZE, "guidance_scale": 0.0}),
        Sampling(
            {**SIZE, "negative_prompt": "ugly, blurred", "cfg_scale": 4.0},
            {**SIZE, "negative_prompt": "ugly, blurred", "guidance_scale": 3.0},
        ),
    ),
    inputs=image_row,
)
