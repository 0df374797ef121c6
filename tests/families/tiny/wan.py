"""Wan 2.1 text to video under the conformance suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families.cases import FamilyCase
from tests.families.tiny import wan_parts
from tests.families.tiny.parts import seeded


def build(folder: Path) -> Path:
    from diffusers import WanPipeline

    with seeded():
        WanPipeline(**wan_parts.components()).save_pretrained(folder)
    return folder


def load(root: Path) -> Any:
    from diffusers import WanPipeline

    return wan_parts.load(WanPipeline, root)


CASE = FamilyCase(
    family="wan",
    diffusers_pipeline="WanPipeline",
    build=build,
    load=load,
    groups={"vae": ("input_latents",), "text_encoder": ("prompt_embeds",)},
    latents=wan_parts.latents,
    encode=wan_parts.encode,
    samplings=wan_parts.samplings(),
    inputs=wan_parts.row,
)
