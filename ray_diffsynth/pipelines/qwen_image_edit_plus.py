"""Qwen-Image-Edit-2509 and later: Qwen-Image-Edit with several images."""

from __future__ import annotations

from typing import ClassVar

from ray_diffsynth.pipelines.qwen_image_edit import IMAGE_PAD, QwenImageEditPipeline


class QwenImageEditPlusPipeline(QwenImageEditPipeline):
    """Qwen-Image-Edit-2509 and later: `edit_image` may be a list, and the text encoder sees small images."""

    version = 1
    family: ClassVar[str] = "qwen_image_edit_plus"
    diffusers_pipeline: ClassVar[str] = "QwenImageEditPlusPipeline"
    image_text: ClassVar[str] = f"Picture {{}}: <|vision_start|>{IMAGE_PAD}<|vision_end|>"
    vision_area: ClassVar[int | None] = 384 * 384
