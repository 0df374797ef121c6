"""Wan 2.1 image to video under the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tests.families.cases import FamilyCase, make_image
from tests.families.tiny import wan_parts
from tests.families.tiny.parts import seeded
from tests.families.tiny.wan_parts import FRAMES, HEIGHT, WIDTH

FIRST = make_image(HEIGHT, WIDTH, seed=11)


def build(folder: Path) -> Path:
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    with seeded():
        parts = wan_parts.components(condition_channels=20, image_dim=8)
        config = CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
        parts["image_encoder"] = CLIPVisionModel(config).eval()
        parts["image_processor"] = CLIPImageProcessorPil(crop_size=32, size=32)
        WanImageToVideoPipeline(**parts).save_pretrained(folder)
    return folder


def load(root: Path) -> Any:
    from diffusers import WanImageToVideoPipeline

    return wan_parts.load(WanImageToVideoPipeline, root)


def row(index: int) -> dict[str, Any]:
    plain = wan_parts.row(index)
    return {**plain, "input_image": Image.fromarray(plain["input_video"][0])}


def encode(pipe: Any, row: Mapping[str, Any]) -> Mapping[str, Tensor]:
    pixels = pipe.video_processor.preprocess(row["input_image"], height=HEIGHT, width=WIDTH)
    shape = (1, pipe.vae.config.z_dim, HEIGHT, WIDTH, FRAMES)
    _, condition = pipe.prepare_latents(pixels, *shape, torch.float32, "cpu", None)
    return {**wan_parts.encode(pipe, row), "y": condition, "image_embeds": pipe.encode_image(row["input_image"])}


CASE = FamilyCase(
    family="wan_i2v",
    diffusers_pipeline="WanImageToVideoPipeline",
    build=build,
    load=load,
    groups={"vae": ("input_latents", "y"), "text_encoder": ("prompt_embeds",), "image_encoder": ("image_embeds",)},
    latents=wan_parts.latents,
    encode=encode,
    samplings=wan_parts.samplings(ours={"input_image": FIRST}, theirs={"image": FIRST}),
    inputs=row,
)
