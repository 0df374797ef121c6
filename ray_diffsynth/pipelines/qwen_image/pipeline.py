"""Qwen-Image on diffusers' and transformers' own classes: text to image, and image to image by `input_image`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.pipelines.qwen_image.model import model_fn
from ray_diffsynth.pipelines.shared.image_pipeline import MAX_SEQUENCE_LENGTH, ImagePipeline, SamplingDefaults
from ray_diffsynth.pipelines.shared.image_units import ImageUnit_PromptEmbedder, image_units
from ray_diffsynth.pipelines.shared.packing import pack_latents, unpack_latents
from ray_diffsynth.pipelines.shared.text import warn_of_cut
from ray_diffsynth.pipelines.shared.tiling import CAUSAL_VAE_TILING_VERSION, causal_vae_tiling


class QwenImagePipeline(ImagePipeline):
    """Qwen-Image. Latents are (B, C, h, w), the VAE's one frame removed; prompt embeddings (1, L, D), unpadded."""

    version = 1
    pixel_transforms: ClassVar[Mapping[str, int]] = {
        **ImagePipeline.pixel_transforms,
        "tiling": CAUSAL_VAE_TILING_VERSION,
    }
    text_libraries: ClassVar[tuple[str, ...]] = ("diffusers",)  # its prompt template and encoding
    family: ClassVar[str] = "qwen_image"
    schedule: ClassVar[str] = "Qwen-Image"
    defaults: SamplingDefaults = SamplingDefaults(height=1328, width=1328, cfg_scale=4.0)
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": Part("text_encoder", "transformers:Qwen2_5_VLForConditionalGeneration", ("tokenizer",)),
        "vae": Part("vae", "diffusers:AutoencoderKLQwenImage"),
        "dit": Part("transformer", "diffusers:QwenImageTransformer2DModel"),
    }
    companions: ClassVar[Mapping[str, Part]] = {"tokenizer": Part("tokenizer", "transformers:Qwen2Tokenizer")}
    padded_params: ClassVar[Mapping[str, str]] = {"prompt_embeds": "prompt_embeds_mask"}
    collate_outputs: ClassVar[tuple[str, ...]] = ("prompt_embeds_mask",)
    lora_prefix: ClassVar[str] = "diffusion_model."
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
        "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1",
    )  # fmt: skip

    text_encoder: Any
    tokenizer: Any

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype, height_division_factor=16, width_division_factor=16)
        self.latent_channels = 16
        self.vae_scale_factor = 8
        self.units = [*image_units(), ImageUnit_PromptEmbedder()]
        self.model_fn = model_fn

    def configure(self, source: ModelSource) -> None:
        """Take the latents' geometry from the VAE's configuration, even if its weights are not loaded."""
        if config := source.config("vae"):
            self.latent_channels = int(config.get("z_dim", 16))
            self.vae_scale_factor = 2 ** len(config.get("temperal_downsample", (False, True, True)))
        # The transformer packs 2 x 2 latents into a token.
        self.height_division_factor = self.width_division_factor = 2 * self.vae_scale_factor

    def prompt_templates(self) -> Mapping[str, str]:
        template, dropped = diffusers_template("QwenImagePipeline")
        return {"prompt": template, "dropped tokens": str(dropped)}

    def encode_images(self, pixels: Tensor, *, tiled: bool, tile_size: int, tile_stride: int) -> Tensor:
        with causal_vae_tiling(self.vae, tiled, tile_size * self.vae_scale_factor, tile_stride * self.vae_scale_factor):
            moments = self.vae.encode(pixels.to(self.vae.dtype)[:, :, None]).latent_dist
        mean, std = self._latent_statistics()
        latents: Tensor = (moments.mode()[:, :, 0].float() - mean) / std
        return latents.to(self.torch_dtype)

    def decode_latents(self, latents: Tensor, *, tiled: bool, tile_size: int, tile_stride: int) -> Tensor:
        mean, std = self._latent_statistics()
        raw = (latents.float() * std + mean).to(self.vae.dtype)
        with causal_vae_tiling(self.vae, tiled, tile_size * self.vae_scale_factor, tile_stride * self.vae_scale_factor):
            pixels: Tensor = self.vae.decode(raw[:, :, None]).sample
        return pixels[:, :, 0]

    def encode_prompts(self, prompts: Sequence[str], *, max_sequence_length: int = MAX_SEQUENCE_LENGTH) -> list[Tensor]:
        """One unpadded embedding (1, L, D) a prompt, by diffusers' own template and encoding; cut to the maximum."""
        from diffusers import QwenImagePipeline as DiffusersPipeline

        encoder: Any = DiffusersPipeline(
            scheduler=None, vae=None, text_encoder=self.text_encoder, tokenizer=self.tokenizer, transformer=None
        )
        # One token more than allowed shows which prompts are cut.
        limit = max_sequence_length + 1
        encoder.tokenizer_max_length = max(encoder.tokenizer_max_length, limit)
        embeds, mask = encoder.encode_prompt(list(prompts), device=self.device, max_sequence_length=limit)
        result = []
        for index, prompt in enumerate(prompts):
            single = embeds[index] if mask is None else embeds[index][mask[index].bool()]
            if len(single) > max_sequence_length:
                whole = self.tokenizer(encoder.prompt_template_encode.format(prompt)).input_ids
                warn_of_cut(prompt, len(whole) - encoder.prompt_template_encode_start_idx, max_sequence_length)
            # A copy, so that the row does not keep the whole padded batch in memory.
            result.append(single[:max_sequence_length].clone()[None].to(self.torch_dtype))
        return result

    def guided_prediction(self, posi: Mapping[str, Any], nega: Mapping[str, Any], cfg_scale: float) -> Tensor:
        """Guidance, then each token gets back the norm of the positive prediction, as diffusers does for Qwen-Image."""
        if cfg_scale == 1:
            return self.predict(posi)
        height, width = posi["latents"].shape[-2:]
        positive, negative = pack_latents(self.predict(posi)), pack_latents(self.predict(nega))
        combined = negative + cfg_scale * (positive - negative)
        norms = torch.norm(positive, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True)
        return unpack_latents(combined * norms, height, width)

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, fp32, (1, C, 1, 1)."""
        config = self.vae.config
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std


@cache
def diffusers_template(pipeline: str) -> tuple[str, int]:
    """diffusers' prompt template of a pipeline, and how many tokens of its beginning are dropped."""
    import diffusers

    cls = getattr(diffusers, pipeline)
    pipe = cls(**{name: None for name in inspect.signature(cls.__init__).parameters if name != "self"})
    return pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
