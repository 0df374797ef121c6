"""The parts as one pipeline, and that pipeline as a folder of bf16 weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

from ray_diffsynth.demo.text_encoder import build_text_encoder
from ray_diffsynth.demo.tiny import build_scheduler
from ray_diffsynth.demo.tokenizer import build_tokenizer

SAMPLER_SHIFT = 1.1  # e^1.1 = 3.0, the shift of the training


def pipeline(vae: AutoencoderKLQwenImage, dit: QwenImageTransformer2DModel) -> QwenImagePipeline:
    """The whole model."""
    tokenizer = build_tokenizer()
    return QwenImagePipeline(
        scheduler=build_scheduler(SAMPLER_SHIFT),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=dit,
    )


def export_model(folder: Path, vae: AutoencoderKLQwenImage, dit: QwenImageTransformer2DModel) -> int:
    """Save the model in bf16 in the standard layout, free of the paths it was built in; returns the bytes written."""
    pipeline(vae, dit).to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text("utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
