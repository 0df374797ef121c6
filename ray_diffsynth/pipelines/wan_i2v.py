"""Wan 2.1 image to video: text to video, and the first frame as latents and as CLIP sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.pipelines.core.unit import PipelineUnit
from ray_diffsynth.pipelines.wan.pipeline import WanPipeline


class WanImageToVideoPipeline(WanPipeline):
    """Wan 2.1 I2V. In training the first frame of the video is the `input_image`."""

    version = 1
    family: ClassVar[str] = "wan_i2v"
    parts: ClassVar[Mapping[str, Part]] = {
        **WanPipeline.parts,
        "image_encoder": Part("image_encoder", "transformers:CLIPVisionModel", ("image_processor",)),
    }
    companions: ClassVar[Mapping[str, Part]] = {
        **WanPipeline.companions,
        # The one on Pillow: it needs no torchvision, and gives the same pixels on every machine.
        "image_processor": Part("image_processor", "transformers:CLIPImageProcessorPil"),
    }
    column_params: ClassVar[Mapping[str, str]] = {"input_video": "video", "input_image": "video", "prompt": "prompt"}
    file_params: ClassVar[tuple[str, ...]] = ("input_video", "input_image")
    condition_channels: ClassVar[int] = 20

    image_encoder: Any
    image_processor: Any

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.units += [WanVideoUnit_ImageEmbedderVAE(), WanVideoUnit_ImageEmbedderCLIP()]


class WanVideoUnit_ImageEmbedderVAE(PipelineUnit):
    """`input_image` -> y (1, 20, frames, h, w): a mask of 4 channels, and the latents of it and a grey rest.

    The mask is 1 where the video is given: in the first latent frame, 4 frames of the video folded into channels.
    """

    version = 1

    def __init__(self) -> None:
        super().__init__(
            input_params=("input_image", "height", "width", "num_frames", "tiled", "tile_size", "tile_stride"),
            output_params=("y",),
            onload_model_names=("vae",),
        )

    def process(
        self,
        pipe: WanImageToVideoPipeline,
        input_image: Image.Image,
        height: int,
        width: int,
        num_frames: int,
        tiled: bool = False,
        tile_size: int = 34,
        tile_stride: int = 18,
    ) -> dict[str, Any]:
        pipe.load_models_to_device(("vae",))
        first = pipe.preprocess_video([input_image.resize((width, height), Image.Resampling.LANCZOS)])
        given = torch.cat([first, first.new_zeros(1, 3, num_frames - 1, height, width)], dim=2)
        latents = pipe.encode_video(given, tiled=tiled, tile_size=tile_size, tile_stride=tile_stride)
        mask = latents.new_zeros(1, pipe.time_division_factor or 1, *latents.shape[2:])
        mask[:, :, 0] = 1
        return {"y": torch.cat([mask, latents], dim=1)}


class WanVideoUnit_ImageEmbedderCLIP(PipelineUnit):
    """`input_image` -> image_embeds (1, tokens, D): the hidden states before the last layer of CLIP's vision model."""

    version = 1

    def __init__(self) -> None:
        super().__init__(
            input_params=("input_image",), output_params=("image_embeds",), onload_model_names=("image_encoder",)
        )

    def process(self, pipe: WanImageToVideoPipeline, input_image: Image.Image) -> dict[str, Any]:
        return self.process_batch(pipe, [{"input_image": input_image}])[0]

    def process_batch(self, pipe: WanImageToVideoPipeline, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One call of CLIP for all images: it sees them in one size."""
        pipe.load_models_to_device(("image_encoder",))
        images = [inputs["input_image"] for inputs in batch]
        pixels = pipe.image_processor(images=images, return_tensors="pt").pixel_values
        encoder = pipe.image_encoder
        states: Tensor = encoder(pixels.to(pipe.device, encoder.dtype), output_hidden_states=True).hidden_states[-2]
        return [{"image_embeds": single[None].to(pipe.torch_dtype, copy=True)} for single in states]
