"""Images <-> tensors, and the sizes that a family can make."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ray_diffsynth.pipelines.core.errors import PipelineError


class ImageConversion:
    """A part of `BasePipeline`, under DiffSynth-Studio's names."""

    device: torch.device
    torch_dtype: torch.dtype
    height_division_factor: int
    width_division_factor: int
    time_division_factor: int | None
    time_division_remainder: int | None

    def preprocess_image(
        self,
        image: Image.Image | np.ndarray[Any, Any] | Tensor,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        min_value: float = -1.0,
        max_value: float = 1.0,
    ) -> Tensor:
        """A PIL image, or uint8 pixels (H, W, 3), as (1, 3, H, W) in [min_value, max_value]; computed in fp32."""
        if isinstance(image, Image.Image):
            image = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        pixels = torch.as_tensor(image)
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise PipelineError(
                f"an image must be a PIL image or uint8 pixels (height, width, 3), "
                f"not {pixels.dtype} {tuple(pixels.shape)}"
            )
        # Turned as bytes and scaled in place: a quarter of the memory to go through, and the same numbers.
        planes = pixels.to(device or self.device).permute(2, 0, 1)[None].contiguous()
        scaled = planes.float().mul_((max_value - min_value) / 255).add_(min_value)
        return scaled.to(torch_dtype or self.torch_dtype)

    def vae_output_to_image(self, vae_output: Tensor, min_value: float = -1.0, max_value: float = 1.0) -> Image.Image:
        """Pixels (1, 3, H, W) in [min_value, max_value] as a PIL image."""
        scaled = (vae_output[0].float() - min_value) * (255 / (max_value - min_value))
        pixels = scaled.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        return Image.fromarray(pixels.cpu().numpy())

    def check_resize_height_width(self, height: int, width: int, num_frames: int | None = None) -> tuple[int, ...]:
        """Return the size if the family can make it. DiffSynth-Studio's name; here nothing is rounded.

        Raises:
            PipelineError: a size that does not divide; gives the nearest that do.
        """
        for name, value, factor in (
            ("height", height, self.height_division_factor),
            ("width", width, self.width_division_factor),
        ):
            if value <= 0 or value % factor:
                lower = value // factor * factor
                choices = f"{lower} or {lower + factor}" if lower > 0 else str(factor)
                raise PipelineError(f"{name}={value} is not a multiple of {factor}; use {choices}")
        if num_frames is None:
            return height, width
        factor, remainder = self.time_division_factor or 1, self.time_division_remainder or 0
        if num_frames <= 0 or num_frames % factor != remainder:
            lower = (num_frames - remainder) // factor * factor + remainder
            raise PipelineError(
                f"num_frames={num_frames} is not a multiple of {factor} plus {remainder}; "
                f"use {lower} or {lower + factor}"
            )
        return height, width, num_frames
