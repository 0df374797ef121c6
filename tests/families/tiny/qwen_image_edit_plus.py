"""Qwen-Image-Edit-2509 (two images in) under the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.families.cases import FamilyCase, make_image
from tests.families.tiny import edit_parts, qwen_image

SEEN = (320, 480)  # 384 x 384 pixels of the shape of 32 x 48, in steps of 32


def build(folder: Path) -> Path:
    return edit_parts.build(folder, "QwenImageEditPlusPipeline")


def load(root: Path) -> Any:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    return edit_parts.load(root, module.QwenImageEditPlusPipeline, module)


def row(index: int) -> dict[str, Any]:
    return edit_parts.row(index, 2)


def encode(pipe: Any, row: Mapping[str, Any]) -> Mapping[str, Tensor]:
    images = [pipe.image_processor.resize(one, *SEEN) for one in row["edit_image"]]
    embeds, mask = pipe.encode_prompt(row["prompt"], image=images)
    assert mask is None
    return {**edit_parts.encode(pipe, row), "prompt_embeds": embeds}


CASE = FamilyCase(
    family="qwen_image_edit_plus",
    diffusers_pipeline="QwenImageEditPlusPipeline",
    build=build,
    load=load,
    groups={"vae": ("input_latents", "edit_latents"), "text_encoder": ("prompt_embeds",)},
    latents=qwen_image.latents,
    encode=encode,
    samplings=edit_parts.samplings([make_image(seed=50), make_image(seed=51)]),
    inputs=row,
)
