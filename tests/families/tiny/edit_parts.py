"""Tiny Qwen-Image-Edit models, and diffusers' pipeline of one without torchvision."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tests.families.cases import PROMPTS, Sampling, image_row, make_image
from tests.tiny_models import tiny_qwen_image

SIZE = {"height": 32, "width": 48, "num_inference_steps": 3}
AREA = 1024 * 1024


def build(folder: Path, pipeline: str) -> Path:
    from transformers import Qwen2VLImageProcessorPil

    tiny_qwen_image(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112).save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": pipeline, "processor": ["transformers", "Qwen2VLProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class Processor:
    """What the pipelines call of Qwen2VLProcessor, which itself needs torchvision (for videos)."""

    def __init__(self, root: Path) -> None:
        from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil

        self.images = Qwen2VLImageProcessorPil.from_pretrained(root / "processor")
        self.tokenizer = Qwen2Tokenizer.from_pretrained(root / "tokenizer")

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        seen = self.images(images=images, return_tensors=return_tensors)
        tokens = iter((seen["image_grid_thw"].prod(1) // 4).tolist())
        texts = [re.sub(r"<\|image_pad\|>", lambda match: match[0] * next(tokens), one) for one in text]
        seen.update(self.tokenizer(texts, padding=padding, return_tensors=return_tensors))
        return seen


def load(root: Path, cls: Any, module: ModuleType) -> Any:
    """diffusers' pipeline: small images stay small, and mm_token_type_ids, which it drops, are given to the model."""
    dimensions = getattr(module, "calculate_dimensions")  # noqa: B009
    if not hasattr(dimensions, "small"):

        def small(area: int, ratio: float) -> Any:
            return (48, 32, None)[: len(dimensions(area, ratio))] if area == AREA else dimensions(area, ratio)

        small.small = True  # type: ignore[attr-defined]
        module.calculate_dimensions = small  # type: ignore[attr-defined]
    pipe = cls.from_pretrained(str(root), processor=None, dtype=torch.float32)
    pipe.processor = Processor(root)
    encoder = pipe.text_encoder
    forward = encoder.forward

    def with_types(*args: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        types = (input_ids == encoder.config.image_token_id).long()
        return forward(*args, input_ids=input_ids, mm_token_type_ids=types, **kwargs)

    encoder.forward = with_types
    return pipe


def row(index: int, count: int | None = None) -> dict[str, Any]:
    """`count`: a list of so many images to edit."""
    images = [make_image(seed=100 + 10 * index + number) for number in range(count or 1)]
    return {**image_row(index), "edit_image": images if count else images[0]}


def encode(pipe: Any, row: Mapping[str, Any]) -> dict[str, Tensor]:
    edit = row["edit_image"] if isinstance(row["edit_image"], list) else [row["edit_image"]]
    target, *given = (
        pipe._encode_vae_image(pipe.image_processor.preprocess(one)[:, :, None], None)[:, :, 0]
        for one in [row["input_image"], *edit]
    )
    return {"input_latents": target, "edit_latents": torch.stack(given, dim=1)}


def samplings(edit: Image.Image | list[Image.Image]) -> tuple[Sampling, ...]:
    ours = {"prompt": PROMPTS[1], "edit_image": edit, "edit_image_auto_resize": False, **SIZE}
    theirs = {"prompt": PROMPTS[1], "image": edit, **SIZE}
    guided = {"negative_prompt": "ugly, blurred"}
    return (
        Sampling({**ours, "cfg_scale": 1.0}, {**theirs, "true_cfg_scale": 1.0}),
        Sampling({**ours, **guided, "cfg_scale": 4.0}, {**theirs, **guided, "true_cfg_scale": 4.0}),
    )
