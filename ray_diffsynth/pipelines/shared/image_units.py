"""The units that the families of images share: size, noise, latents and text."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.unit import PipelineUnit, missing_input
from ray_diffsynth.pipelines.shared.image_pipeline import MAX_SEQUENCE_LENGTH, ImagePipeline
from ray_diffsynth.pipelines.shared.initial_latents import FlowMatchUnit_InitialLatents


def image_units() -> list[PipelineUnit]:
    """The units that all these families begin with: the image's size, noise and latents."""
    return [
        ImageUnit_ShapeChecker(),
        ImageUnit_NoiseInitializer(),
        ImageUnit_ImageEncoder(),
        FlowMatchUnit_InitialLatents(),
    ]


class ImageUnit_ShapeChecker(PipelineUnit):
    """Checks the image's size; takes it from `input_image` where it is not given."""

    version = 1

    def __init__(self) -> None:
        super().__init__(input_params=("height", "width", "input_image"), output_params=("height", "width"))

    def process(
        self,
        pipe: ImagePipeline,
        height: int | None = None,
        width: int | None = None,
        input_image: Image.Image | None = None,
    ) -> dict[str, Any]:
        if input_image is not None:
            height, width = height or input_image.height, width or input_image.width
            if (input_image.height, input_image.width) != (height, width):
                raise PipelineError(
                    f"input_image is {input_image.height}x{input_image.width} (height x width), but the size asked for "
                    f"is {height}x{width}; resize the image first"
                )
        if height is None or width is None:
            raise missing_input(type(self).__name__, "height" if height is None else "width", pipe, before=self)
        pipe.check_resize_height_width(height, width)
        return {"height": height, "width": width}


class ImageUnit_NoiseInitializer(PipelineUnit):
    """The noise that sampling starts from. In training the loss draws keyed noise, so nothing is drawn here."""

    version = 1

    def __init__(self) -> None:
        super().__init__(input_params=("height", "width", "seed", "rand_device"), output_params=("noise",))

    def process(
        self, pipe: ImagePipeline, height: int, width: int, seed: int | None, rand_device: str
    ) -> dict[str, Any]:
        if pipe.scheduler.training:
            return {}
        shape = (1, pipe.latent_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
        return {"noise": pipe.initial_noise(shape, seed, rand_device)}


class ImageUnit_ImageEncoder(PipelineUnit):
    """`input_image` -> clean latents (1, C, h, w)."""

    version = 1

    def __init__(self) -> None:
        super().__init__(
            input_params=("input_image", "tiled", "tile_size", "tile_stride"),
            output_params=("input_latents",),
            onload_model_names=("vae",),
        )

    def process(
        self,
        pipe: ImagePipeline,
        input_image: Image.Image | None = None,
        tiled: bool = False,
        tile_size: int = 128,
        tile_stride: int = 64,
    ) -> dict[str, Any]:
        inputs = {"input_image": input_image, "tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride}
        return self.process_batch(pipe, [inputs])[0]

    def process_batch(self, pipe: ImagePipeline, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One call of the VAE for all images of one size."""
        results: list[dict[str, Any]] = [{} for _ in batch]
        together: dict[tuple[Any, ...], list[int]] = {}
        for index, inputs in enumerate(batch):
            image = inputs.get("input_image")
            if image is not None:
                tiling = (inputs.get("tiled", False), inputs.get("tile_size", 128), inputs.get("tile_stride", 64))
                together.setdefault((image.size, *tiling), []).append(index)
            elif pipe.scheduler.training:
                raise missing_input(type(self).__name__, "input_image", pipe, before=self)
        if together:
            pipe.load_models_to_device(("vae",))
        for (_, tiled, tile_size, tile_stride), indices in together.items():
            pixels = torch.cat([pipe.preprocess_image(batch[index]["input_image"]) for index in indices])
            latents = pipe.encode_images(pixels, tiled=tiled, tile_size=tile_size, tile_stride=tile_stride)
            for row, index in enumerate(indices):
                results[index] = {"input_latents": latents[row : row + 1].clone()}
        return results


class ImageUnit_PromptEmbedder(PipelineUnit):
    """`prompt` (and `negative_prompt`) -> embeddings (1, L, D), by the pipeline's `encode_prompts`.

    Args:
        model: the text encoder that `encode_prompts` runs.
    """

    version = 1

    def __init__(self, model: str = "text_encoder") -> None:
        super().__init__(
            seperate_cfg=True,
            input_params=("max_sequence_length",),
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            output_params=("prompt_embeds",),
            onload_model_names=(model,),
        )

    def process(
        self, pipe: ImagePipeline, prompt: str, max_sequence_length: int = MAX_SEQUENCE_LENGTH
    ) -> dict[str, Any]:
        return self.process_batch(pipe, [{"prompt": prompt, "max_sequence_length": max_sequence_length}])[0]

    def process_batch(self, pipe: ImagePipeline, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One call of the text encoder for all prompts of one maximum length."""
        together: dict[int, list[int]] = {}
        for index, inputs in enumerate(batch):
            together.setdefault(inputs.get("max_sequence_length", MAX_SEQUENCE_LENGTH), []).append(index)
        pipe.load_models_to_device(self.onload_model_names or ())
        results: list[dict[str, Any]] = [{} for _ in batch]
        for limit, indices in together.items():
            embeds = pipe.encode_prompts([batch[index]["prompt"] for index in indices], max_sequence_length=limit)
            for index, single in zip(indices, embeds, strict=True):
                results[index] = {"prompt_embeds": single}
        return results
