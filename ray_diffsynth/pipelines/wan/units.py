"""The units of text to video: the video's size, noise, latents, and the text. Image to video adds its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.unit import PipelineUnit, missing_input

Video: TypeAlias = Sequence[Image.Image] | np.ndarray[Any, Any] | Tensor
"""Images, or uint8 pixels (frames, height, width, 3)."""


class VideoPipeline(Protocol):
    """What the units ask of their pipeline; see `WanPipeline`."""

    scheduler: FlowMatchScheduler

    def check_resize_height_width(self, height: int, width: int, num_frames: int | None = None) -> tuple[int, ...]: ...
    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]: ...
    def initial_noise(self, shape: Sequence[int], seed: int | None, rand_device: str = "cpu") -> Tensor: ...
    def load_models_to_device(self, names: Sequence[str]) -> None: ...
    def preprocess_video(self, video: Video) -> Tensor: ...
    def encode_video(self, pixels: Tensor, *, tiled: bool, tile_size: int, tile_stride: int) -> Tensor: ...
    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]: ...


class WanVideoUnit_ShapeChecker(PipelineUnit):
    """Checks the video's size and number of frames; takes them from `input_video` where they are not given."""

    version = 1

    def __init__(self) -> None:
        names = ("height", "width", "num_frames")
        super().__init__(input_params=(*names, "input_video"), output_params=names)

    def process(
        self,
        pipe: VideoPipeline,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        input_video: Video | None = None,
    ) -> dict[str, Any]:
        size = {"height": height, "width": width, "num_frames": num_frames}
        if input_video is not None:
            found = dict(zip(size, _size(input_video), strict=True))
            size = {name: found[name] if value is None else value for name, value in size.items()}
            if size != found:
                raise PipelineError(f"input_video is {found}, but the size asked for is {size}; cut the video first")
        for name, value in size.items():
            if value is None:
                raise missing_input(type(self).__name__, name, pipe, before=self)
        pipe.check_resize_height_width(*(int(value) for value in size.values() if value is not None))
        return dict(size)


class WanVideoUnit_NoiseInitializer(PipelineUnit):
    """The noise that sampling starts from. In training the loss draws keyed noise, so nothing is drawn here."""

    version = 1

    def __init__(self) -> None:
        super().__init__(
            input_params=("height", "width", "num_frames", "seed", "rand_device"), output_params=("noise",)
        )

    def process(
        self, pipe: VideoPipeline, height: int, width: int, num_frames: int, seed: int | None, rand_device: str
    ) -> dict[str, Any]:
        if pipe.scheduler.training:
            return {}
        return {"noise": pipe.initial_noise(pipe.latent_shape(height, width, num_frames), seed, rand_device)}


class WanVideoUnit_InputVideoEmbedder(PipelineUnit):
    """`input_video` -> clean latents (1, C, frames, h, w)."""

    version = 1

    def __init__(self) -> None:
        super().__init__(
            input_params=("input_video", "tiled", "tile_size", "tile_stride"),
            output_params=("input_latents",),
            onload_model_names=("vae",),
        )

    def process(
        self,
        pipe: VideoPipeline,
        input_video: Video | None = None,
        tiled: bool = False,
        tile_size: int = 34,
        tile_stride: int = 18,
    ) -> dict[str, Any]:
        if input_video is None:
            if pipe.scheduler.training:
                raise missing_input(type(self).__name__, "input_video", pipe, before=self)
            return {}
        pipe.load_models_to_device(("vae",))
        pixels = pipe.preprocess_video(input_video)
        return {"input_latents": pipe.encode_video(pixels, tiled=tiled, tile_size=tile_size, tile_stride=tile_stride)}


class WanVideoUnit_PromptEmbedder(PipelineUnit):
    """`prompt` (and `negative_prompt`) -> embeddings (1, L, D) without padding; `model_fn` pads them."""

    version = 1

    def __init__(self) -> None:
        super().__init__(
            seperate_cfg=True,
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            output_params=("prompt_embeds",),
            onload_model_names=("text_encoder",),
        )

    def process(self, pipe: VideoPipeline, prompt: str) -> dict[str, Any]:
        return self.process_batch(pipe, [{"prompt": prompt}])[0]

    def process_batch(self, pipe: VideoPipeline, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One call of the text encoder for all prompts."""
        pipe.load_models_to_device(("text_encoder",))
        embeds = pipe.encode_prompts([inputs["prompt"] for inputs in batch])
        return [{"prompt_embeds": single} for single in embeds]


def _size(video: Video) -> tuple[int, int, int]:
    """(height, width, frames)."""
    first = video[0]
    height, width = (first.height, first.width) if isinstance(first, Image.Image) else first.shape[:2]
    return height, width, len(video)
