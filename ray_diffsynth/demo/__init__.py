"""A tiny model of the Qwen-Image architecture that really draws, and the images it was trained on."""

from __future__ import annotations

from pathlib import Path


def demo_model_path() -> Path:
    """The folder of the shipped model, in the layout that QwenImagePipeline.from_pretrained reads."""
    return Path(__file__).parent / "weights"
