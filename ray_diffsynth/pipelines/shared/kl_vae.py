"""Image families whose VAE is diffusers' AutoencoderKL or has its shape (FLUX.2's)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.shared.image_pipeline import ImagePipeline
from ray_diffsynth.pipelines.shared.tiling import KL_VAE_TILING_VERSION, kl_scale_factor, kl_vae_tiling


class KLImagePipeline(ImagePipeline):
    """Encodes and decodes by `vae`; 2 x 2 of its latents are one token of the transformer."""

    version = 1
    pixel_transforms: ClassVar[Mapping[str, int]] = {**ImagePipeline.pixel_transforms, "tiling": KL_VAE_TILING_VERSION}

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype, height_division_factor=16, width_division_factor=16)
        self.latent_channels = 16
        self.vae_scale_factor = 8

    def configure(self, source: ModelSource) -> None:
        """Take the latents' geometry from the VAE's configuration, even if its weights are not loaded."""
        if config := source.config("vae"):
            self.latent_channels = int(config.get("latent_channels", 16))
            self.vae_scale_factor = kl_scale_factor(config)
        self.height_division_factor = self.width_division_factor = 2 * self.vae_scale_factor

    def normalise(self, raw: Tensor) -> Tensor:
        """The VAE's latents, fp32, -> what the transformer is trained on."""
        normal: Tensor = (raw - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        return normal

    def denormalise(self, latents: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        raw: Tensor = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return raw

    def encode_images(self, pixels: Tensor, *, tiled: bool, tile_size: int, tile_stride: int) -> Tensor:
        with kl_vae_tiling(self.vae, tiled, tile_size, tile_stride):
            raw = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()
        return self.normalise(raw.float()).to(self.torch_dtype)

    def decode_latents(self, latents: Tensor, *, tiled: bool, tile_size: int, tile_stride: int) -> Tensor:
        raw = self.denormalise(latents.float()).to(self.vae.dtype)
        with kl_vae_tiling(self.vae, tiled, tile_size, tile_stride):
            pixels: Tensor = self.vae.decode(raw).sample
        return pixels
