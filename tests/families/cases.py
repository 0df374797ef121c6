"""What the conformance suite needs to know of a family; each family states it once, as CASE in tiny/<family>.py.

A new family adds its name to FAMILIES here and a module tests/families/tiny/<family>.py with

    def build(folder: Path) -> Path     a random-weight model in the standard diffusers layout, built offline
    CASE = FamilyCase(...)

The parts that families share (tokenizers, text encoders, VAEs) are in tiny/parts.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

FAMILIES = ("qwen_image", "flux", "z_image", "flux2", "wan", "wan_i2v", "qwen_image_edit", "qwen_image_edit_plus")
PROMPTS = ("a red square", "a small blue circle on a white table, oil painting", "")


@dataclass(frozen=True)
class Sampling:
    """One call, as ours and as diffusers' pipeline takes it; the suite adds the seed and `output_type`."""

    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]


@dataclass(frozen=True)
class FamilyCase:
    """One family under the suite.

    Args:
        family: name in the registry; `family_of` must find it from what `build` writes.
        diffusers_pipeline: diffusers' class for the same model.
        groups: what the cache holds for SFT of the dit: group name -> parameters. Nothing else may be in it.
        latents: diffusers' output of output_type="latent" -> our normalised latents; gets diffusers' pipeline too.
        encode: what diffusers' pipeline makes of a row, as cached parameters (each (1, …)); what may be compared.
        samplings: with and without guidance; a few steps. The first one is used for the images and the LoRA too.
        inputs: the dataset row number i, decoded; rows 0, 1, 2 fit in one batch and differ in prompt length.
        settings: overrides of `training_settings` that keep the tiny model fast.
        lora_targets: None: the family's own.
        tolerance: of the sampling loop against diffusers.
        load: makes diffusers' pipeline of the folder, where its from_pretrained alone does not do.
    """

    family: str
    diffusers_pipeline: str
    build: Callable[[Path], Path]
    groups: Mapping[str, tuple[str, ...]]
    latents: Callable[[Any, Tensor], Tensor]
    encode: Callable[[Any, Mapping[str, Any]], Mapping[str, Tensor]]
    samplings: Sequence[Sampling]
    inputs: Callable[[int], dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    lora_targets: tuple[str, ...] | None = None
    tolerance: float = 1e-4
    load: Callable[[Path], Any] | None = None


def load_case(family: str) -> FamilyCase:
    """The CASE of tests/families/tiny/<family>.py, imported on first use (diffusers is slow to import)."""
    case: FamilyCase = importlib.import_module(f"tests.families.tiny.{family}").CASE
    return case


def make_image(height: int = 32, width: int = 48, seed: int = 0) -> Image.Image:
    """Random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_row(index: int) -> dict[str, Any]:
    """The decoded row of a text-to-image dataset."""
    return {"input_image": make_image(seed=index), "prompt": PROMPTS[index], "height": 32, "width": 48}
