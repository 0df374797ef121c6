"""Qwen-Image-Edit: Qwen-Image with images to edit, which its text encoder and its transformer both see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from ray_diffsynth.diffusion.gradient_checkpoint import enable_checkpointing
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.pipelines.core.sampling import ProgressBar, no_progress_bar
from ray_diffsynth.pipelines.core.state import UnitState
from ray_diffsynth.pipelines.core.unit import PipelineUnit
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline, diffusers_template
from ray_diffsynth.pipelines.shared.image_units import image_units
from ray_diffsynth.pipelines.shared.packing import pack_latents, unpack_latents

Images: TypeAlias = Image.Image | Sequence[Image.Image]

EditLatents: TypeAlias = Tensor | Sequence[Sequence[Tensor]]

EDIT_AREA = 1024 * 1024
"""Pixels to which diffusers scales an image before it is edited."""
IMAGE_PAD = "<|image_pad|>"


class QwenImageEditPipeline(QwenImagePipeline):
    """Qwen-Image-Edit. `edit_image` is the image to edit, `input_image` the result."""

    version = 1
    family: ClassVar[str] = "qwen_image_edit"
    parts: ClassVar[Mapping[str, Part]] = {
        **QwenImagePipeline.parts,
        "text_encoder": Part(
            "text_encoder", "transformers:Qwen2_5_VLForConditionalGeneration", ("tokenizer", "processor")
        ),
    }
    companions: ClassVar[Mapping[str, Part]] = {
        **QwenImagePipeline.companions,
        # The one on Pillow: it needs no torchvision, and gives the same pixels on every machine.
        "processor": Part("processor", "transformers:Qwen2VLImageProcessorPil"),
    }
    column_params: ClassVar[Mapping[str, str]] = {
        "input_image": "image",
        "edit_image": "edit_image",
        "prompt": "prompt",
    }
    file_params: ClassVar[tuple[str, ...]] = ("input_image", "edit_image")
    reference_params: ClassVar[tuple[str, ...]] = ("edit_image",)
    diffusers_pipeline: ClassVar[str] = "QwenImageEditPipeline"
    """Whose prompt template is used."""
    image_text: ClassVar[str] = ""
    """What stands before the prompt for each image, {} its number; empty: the template has the place of one."""
    vision_area: ClassVar[int | None] = None
    """Pixels to which an image is scaled for the text encoder; None: it sees the image that the VAE sees."""

    processor: Any

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.units = [*image_units(), QwenImageEditUnit_EditImageEmbedder(), QwenImageEditUnit_PromptEmbedder()]
        self.model_fn = model_fn

    def training_settings(self) -> dict[str, Any]:
        # Off: a dataset's images are scaled to their bucket, by their own shape.
        return {**super().training_settings(), "edit_image_auto_resize": False}

    def prompt_templates(self) -> Mapping[str, str]:
        template, dropped = diffusers_template(self.diffusers_pipeline)
        return {"prompt": template, "dropped tokens": str(dropped), "image": self.image_text}

    def images(self, edit_image: Images) -> list[Image.Image]:
        """`edit_image` as a list. Raises PipelineError for none, or more than the family takes."""
        images = [edit_image] if isinstance(edit_image, Image.Image) else list(edit_image)
        if not images or (len(images) > 1 and not self.image_text):
            raise PipelineError(
                f"edit_image holds {len(images)} images, but the family {self.family} edits one; "
                "several are for --family qwen_image_edit_plus (Qwen-Image-Edit-2509 and later)"
            )
        return images

    def encode_edit_prompt(self, prompt: str, images: Sequence[Image.Image]) -> Tensor:
        """One embedding (1, L, D) of the images and the prompt, without the tokens of the template's beginning."""
        seen = self.processor(images=list(images), return_tensors="pt").to(self.device)
        text, drop = self._vision_text(prompt, seen.image_grid_thw)
        tokens = self.tokenizer([text], return_tensors="pt").to(self.device)
        outputs = self.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=seen.pixel_values.to(self.torch_dtype),
            image_grid_thw=seen.image_grid_thw,
            # Without it transformers >= 5 gives the images positions of text, in silence.
            mm_token_type_ids=(tokens.input_ids == self.text_encoder.config.image_token_id).long(),
            output_hidden_states=True,
        )
        embeds: Tensor = outputs.hidden_states[-1][:, drop:].clone().to(self.torch_dtype)
        return embeds

    def _vision_text(self, prompt: str, grids: Tensor) -> tuple[str, int]:
        """The templated prompt with a placeholder for each token of the images, and how many tokens are dropped."""
        template, drop = diffusers_template(self.diffusers_pipeline)
        before = "".join(self.image_text.format(number) for number in range(1, len(grids) + 1))
        head, *tails = template.format(before + prompt).split(IMAGE_PAD)
        if len(tails) != len(grids):
            raise PipelineError(f"the prompt holds {IMAGE_PAD}, which stands for an image; take it out: {prompt:.80}")
        counts = (grids.prod(dim=1) // self.processor.merge_size**2).tolist()
        return head + "".join(IMAGE_PAD * count + tail for count, tail in zip(counts, tails, strict=True)), drop

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str,
        edit_image: Images,
        negative_prompt: str = "",
        cfg_scale: float | None = None,
        input_image: Image.Image | None = None,
        denoising_strength: float = 1.0,
        edit_image_auto_resize: bool = True,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        rand_device: str = "cpu",
        num_inference_steps: int | None = None,
        tiled: bool = False,
        tile_size: int = 128,
        tile_stride: int = 64,
        output_type: str = "pil",
        progress_bar_cmd: ProgressBar = no_progress_bar,
    ) -> Image.Image | Tensor:
        """Edit one image, or make one of several. Arguments that are not named here: `ImagePipeline.__call__`.

        Args:
            edit_image: the image; several where the family takes them.
            edit_image_auto_resize: scale the images to about 1024 x 1024 pixels of their shape, as diffusers does.
            height, width: of the result; None: those of the last image, scaled.
        """
        last = scaled_size(self.images(edit_image)[-1], EDIT_AREA)
        own = self.defaults
        shared = {
            "cfg_scale": own.cfg_scale if cfg_scale is None else cfg_scale,
            "edit_image": edit_image, "edit_image_auto_resize": edit_image_auto_resize, "input_image": input_image,
            "height": height or last[1], "width": width or last[0], "seed": seed, "rand_device": rand_device,
            "tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride,
        }  # fmt: skip
        return self.generate(
            UnitState(shared, {"prompt": prompt}, {"negative_prompt": negative_prompt}),
            num_inference_steps=num_inference_steps or own.num_inference_steps,
            denoising_strength=denoising_strength,
            output_type=output_type,
            progress_bar_cmd=progress_bar_cmd,
        )


class QwenImageEditUnit_EditImageEmbedder(PipelineUnit):
    """`edit_image` -> edit_latents (1, images, C, h, w); of images of several sizes a list of (1, C, h, w)."""

    version = 1

    def __init__(self) -> None:
        super().__init__(
            input_params=("edit_image", "edit_image_auto_resize", "tiled", "tile_size", "tile_stride"),
            output_params=("edit_latents",),
            onload_model_names=("vae",),
        )

    def process(
        self,
        pipe: QwenImageEditPipeline,
        edit_image: Images,
        edit_image_auto_resize: bool = False,
        tiled: bool = False,
        tile_size: int = 128,
        tile_stride: int = 64,
    ) -> dict[str, Any]:
        images = pipe.images(edit_image)
        if edit_image_auto_resize:
            images = [resized(image, EDIT_AREA) for image in images]
        for image in images:
            pipe.check_resize_height_width(image.height, image.width)
        pipe.load_models_to_device(("vae",))
        pixels = (pipe.preprocess_image(image) for image in images)
        tiling: dict[str, Any] = {"tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride}
        latents = [pipe.encode_images(image, **tiling) for image in pixels]
        same = len({image.size for image in images}) == 1
        return {"edit_latents": torch.stack(latents, dim=1) if same else latents}


class QwenImageEditUnit_PromptEmbedder(PipelineUnit):
    """`prompt` (and `negative_prompt`) with the images -> embeddings (1, L, D) without padding."""

    version = 1

    def __init__(self) -> None:
        super().__init__(
            seperate_cfg=True,
            input_params=("edit_image", "edit_image_auto_resize"),
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            output_params=("prompt_embeds",),
            onload_model_names=("text_encoder",),
        )

    def process(
        self, pipe: QwenImageEditPipeline, prompt: str, edit_image: Images, edit_image_auto_resize: bool = False
    ) -> dict[str, Any]:
        pipe.load_models_to_device(("text_encoder",))
        area = pipe.vision_area or (EDIT_AREA if edit_image_auto_resize else None)
        images = [image if area is None else resized(image, area) for image in pipe.images(edit_image)]
        return {"prompt_embeds": pipe.encode_edit_prompt(prompt, images)}


def model_fn(
    *,
    dit: Any,
    latents: Tensor,
    timestep: Tensor,
    edit_latents: EditLatents,
    prompt_embeds: Tensor,
    prompt_embeds_mask: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """The velocity noise - x0, in the shape of `latents`: see `qwen_image.model`.

    Args:
        edit_latents: (B, images, C, h, w), clean; of several sizes for each sample a list of (1, C, h, w), the sizes
            alike in all samples. Their tokens follow those of `latents`, and their outputs are cut.
    """
    batch, _, height, width = latents.shape
    enable_checkpointing(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    if isinstance(edit_latents, Tensor):
        images = [latents, *edit_latents.unbind(1)]
    else:
        images = [latents, *(torch.cat(alike) for alike in zip(*edit_latents, strict=True))]
    prediction: Tensor = dit(
        hidden_states=torch.cat([pack_latents(image) for image in images], dim=1),
        timestep=timestep.expand(batch) / 1000,
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_mask=prompt_embeds_mask,
        img_shapes=[[(1, image.shape[-2] // 2, image.shape[-1] // 2) for image in images]] * batch,
        return_dict=False,
    )[0]
    return unpack_latents(prediction[:, : height * width // 4], height, width)


def scaled_size(image: Image.Image, area: int) -> tuple[int, int]:
    """(width, height) of the shape of `image` with about `area` pixels, in steps of 32: diffusers' rule."""
    width = math.sqrt(area * image.width / image.height)
    height = width * image.height / image.width
    return round(width / 32) * 32, round(height / 32) * 32


def resized(image: Image.Image, area: int) -> Image.Image:
    """The image in its `scaled_size`."""
    return image.resize(scaled_size(image, area), Image.Resampling.LANCZOS)
