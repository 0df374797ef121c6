"""Tiny random-weight models for tests."""

from __future__ import annotations

from pathlib import Path


def tiny_qwen_image(folder: Path) -> Path:
    """A Qwen-Image-shaped model in the standard diffusers layout; the same bytes each time."""
    from ray_diffsynth.demo.tiny import build_tiny_model

    return build_tiny_model(folder, seed=0)
