"""Qwen-Image-Edit under the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.families.cases import FamilyCase, make_image
from tests.families.tiny import edit_parts, qwen_image


def build(folder: Path) -> Path:
    return edit_parts.build(folder, "QwenImageEditPipeline")


def load(root: Path) -> Any:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as module

    return edit_parts.load(root, module.QwenImageEditPipeline, module)


def encode(pipe: Any, row: Mapping[str, Any]) -> Mapping[str, Tensor]:
    images = row["edit_image"]
    embeds, mask = pipe.encode_prompt(row["prompt"], image=images)
    assert mask is None
    return {**edit_parts.encode(pipe, row), "prompt_embeds": embeds}


CASE = FamilyCase(
    family="qwen_image_edit",
    diffusers_pipeline="QwenImageEditPipeline",
    build=build,
    load=load,
    groups={"vae": ("input_latents", "edit_latents"), "text_encoder": ("prompt_embeds",)},
    latents=qwen_image.latents,
    encode=encode,
    samplings=edit_parts.samplings(make_image(seed=50)),
    inputs=edit_parts.row,
)
