"""`ImagePipeline`: the base of the families that make one image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ray_diffsynth.diffusion.flow_match import NUM_TRAIN_TIMESTEPS, FlowMatchScheduler
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.sampling import ProgressBar, check_output_type, no_progress_bar
from ray_diffsynth.pipelines.core.state import UnitState

MAX_SEQUENCE_LENGTH = 512  # prompt tokens; what diffusers' pipelines of these families use by default


@dataclass(frozen=True)
class SamplingDefaults:
    """What a family's `__call__` uses where the caller says nothing. `height` and `width` in pixels."""

    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 30
    cfg_scale: float = 1.0
    embedded_guidance: float | None = None
    """None: the family has no guidance embedding."""


class ImagePipeline(BasePipeline, ABC):
    """Base of the families that make one image from a prompt; latents are (B, C, h, w).

    A subclass sets the units (`image_units`, and `ImageUnit_PromptEmbedder` or its own for the text), `model_fn`,
    `latent_channels` and `vae_scale_factor`, and implements the abstract methods.
    """

    version = 1
    defaults: SamplingDefaults = SamplingDefaults()
    """`configure` may choose others by the model."""
    noise_dtype: ClassVar[torch.dtype | None] = None
    """Of the noise and of the latents between the steps; None: the pipeline's."""
    vae: Any
    dit: Any
    latent_channels: int
    """C of the latents."""
    vae_scale_factor: int
    """Pixels a latent, each way."""

    def training_settings(self) -> dict[str, Any]:
        return {**super().training_settings(), "max_sequence_length": MAX_SEQUENCE_LENGTH}

    @abstractmethod
    def encode_images(self, pixels: Tensor, *, tiled: bool, tile_size: int, tile_stride: int) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> normalised latents (B, C, h, w): the mode of the VAE's distribution.

        `tile_size` and `tile_stride` are in the VAE's latents, as in DiffSynth-Studio.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor, *, tiled: bool, tile_size: int, tile_stride: int) -> Tensor:
        """Inverse of `encode_images`: pixels (B, 3, H, W), about [-1, 1]."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], *, max_sequence_length: int) -> list[Tensor]:
        """One embedding (1, L, D) a prompt, of at most `max_sequence_length` tokens, in the pipeline's dtype."""

    def time_shift(self, tokens: int, steps: int) -> float | None:
        """mu of the sampling schedule for `tokens` image tokens; None: as the scheduler's configuration says."""
        return None

    def initial_noise(self, shape: Sequence[int], seed: int | None, rand_device: str = "cpu") -> Tensor:
        """Drawn in the dtype in which diffusers draws it: the same seed gives the same image."""
        dtype = self.noise_dtype or self.torch_dtype
        return self.generate_noise(shape, seed, rand_device, rand_torch_dtype=dtype, torch_dtype=dtype)

    def sampling_schedule(self, latents: Tensor, num_inference_steps: int) -> FlowMatchScheduler:
        """The schedule of `latents` (B, C, h, w), whose number of tokens decides the shift of some families."""
        schedule = FlowMatchScheduler(self.schedule, config=self.scheduler.config)
        tokens = self._latent_tokens(latents)
        schedule.set_timesteps(
            num_inference_steps, mu=self.time_shift(tokens, num_inference_steps), image_seq_len=tokens
        )
        return schedule

    def shifted_schedule(self, latents: Tensor) -> FlowMatchScheduler:
        """The 1000 timesteps of `latents` (B, C, h, w); a shift by the number of steps is that of `defaults`."""
        schedule = FlowMatchScheduler(self.schedule, config=self.scheduler.config)
        tokens = self._latent_tokens(latents)
        mu = self.time_shift(tokens, self.defaults.num_inference_steps)
        schedule.set_timesteps(NUM_TRAIN_TIMESTEPS, mu=mu, image_seq_len=tokens)
        return schedule

    def _latent_tokens(self, latents: Tensor) -> int:
        height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        return self._tokens(height, width)

    def _tokens(self, height: int, width: int) -> int:
        """Image tokens that the transformer sees of an image of so many pixels."""
        return height // self.height_division_factor * (width // self.width_division_factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        cfg_scale: float | None = None,
        input_image: Image.Image | None = None,
        denoising_strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        rand_device: str = "cpu",
        num_inference_steps: int | None = None,
        tiled: bool = False,
        tile_size: int = 128,
        tile_stride: int = 64,
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
        embedded_guidance: float | None = None,
        output_type: str = "pil",
        progress_bar_cmd: ProgressBar = no_progress_bar,
    ) -> Image.Image | Tensor:
        """Generate one image, by the units that training uses. What is None is the family's `defaults`.

        Args:
            cfg_scale: classifier-free guidance against `negative_prompt`; 1 turns it off and halves the time.
            input_image: start from this image, of `height` x `width`, noised by `denoising_strength` in (0, 1].
            seed: decides the noise; None: another image each time.
            embedded_guidance: of the families whose transformer takes the guidance as an input.
            output_type: "pil", or "latent" for normalised latents (1, C, h, w).
            progress_bar_cmd: wraps the steps, e.g. tqdm.

        Raises:
            PipelineError: a size that does not divide, an unknown output type, guidance that the family has not, a
                model that is not loaded.
        """
        own = self.defaults
        shared: dict[str, Any] = {
            "cfg_scale": own.cfg_scale if cfg_scale is None else cfg_scale,
            "input_image": input_image, "height": height or own.height, "width": width or own.width, "seed": seed,
            "rand_device": rand_device, "tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride,
            "max_sequence_length": max_sequence_length,
        }  # fmt: skip
        if own.embedded_guidance is not None:
            shared["embedded_guidance"] = own.embedded_guidance if embedded_guidance is None else embedded_guidance
        elif embedded_guidance is not None:
            raise PipelineError(f"the family {self.family} has no embedded guidance; use cfg_scale")
        return self.generate(
            UnitState(shared, {"prompt": prompt}, {"negative_prompt": negative_prompt}),
            num_inference_steps=num_inference_steps or own.num_inference_steps,
            denoising_strength=denoising_strength,
            output_type=output_type,
            progress_bar_cmd=progress_bar_cmd,
        )

    def generate(
        self,
        start: UnitState,
        *,
        num_inference_steps: int,
        denoising_strength: float,
        output_type: str,
        progress_bar_cmd: ProgressBar,
    ) -> Image.Image | Tensor:
        """`__call__` for a family with inputs of its own: `start` holds what the units read, sizes and tiling too."""
        check_output_type(output_type)
        shared = start.shared
        height, width = self.check_resize_height_width(shared["height"], shared["width"])
        tokens = self._tokens(height, width)
        mu = self.time_shift(tokens, num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps, denoising_strength, mu=mu, image_seq_len=tokens)
        latents = self.sample_latents(start, progress_bar_cmd=progress_bar_cmd)
        if output_type == "latent":
            return latents
        self.load_models_to_device(("vae",))
        tiling = {name: shared[name] for name in ("tiled", "tile_size", "tile_stride")}
        return self.vae_output_to_image(self.decode_latents(latents, **tiling))
