"""Wan 2.1 text to video (1.3B and 14B), on diffusers' and transformers' own classes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.model_parts import Part, scheduler_config
from ray_diffsynth.pipelines.core.sampling import ProgressBar, check_output_type, no_progress_bar
from ray_diffsynth.pipelines.core.state import UnitState
from ray_diffsynth.pipelines.shared.initial_latents import FlowMatchUnit_InitialLatents
from ray_diffsynth.pipelines.shared.text import warn_of_cut
from ray_diffsynth.pipelines.shared.tiling import CAUSAL_VAE_TILING_VERSION, causal_vae_tiling
from ray_diffsynth.pipelines.wan.model import TEXT_TOKENS, model_fn
from ray_diffsynth.pipelines.wan.units import (
    Video,
    WanVideoUnit_InputVideoEmbedder,
    WanVideoUnit_NoiseInitializer,
    WanVideoUnit_PromptEmbedder,
    WanVideoUnit_ShapeChecker,
)

TILE_SIZE, TILE_STRIDE = 34, 18
"""Of the VAE where it works in tiles, in latents: DiffSynth-Studio's."""

# Module names: diffusers -> Wan's own, which ComfyUI, DiffSynth-Studio and diffusers' loader know.
_ORIGINAL_NAMES = (
    (r"^blocks\.(\d+)\.attn1\.", r"blocks.\1.self_attn."),
    (r"^blocks\.(\d+)\.attn2\.", r"blocks.\1.cross_attn."),
    (r"(_attn)\.to_([qkv])\.", r"\1.\2."),
    (r"(_attn)\.to_out\.0\.", r"\1.o."),
    (r"(_attn)\.add_([kv])_proj\.", r"\1.\2_img."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"^condition_embedder\.(text|time)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^proj_out\.", "head.head."),
)


class WanPipeline(BasePipeline):
    """Wan 2.1 T2V. Latents are (B, 16, frames, h, w); prompt embeddings (1, L, D), unpadded."""

    version = 1
    pixel_transforms: ClassVar[Mapping[str, int]] = {
        **BasePipeline.pixel_transforms,
        "tiling": CAUSAL_VAE_TILING_VERSION,
    }
    text_libraries: ClassVar[tuple[str, ...]] = ("diffusers", "ftfy")  # they clean the prompt
    family: ClassVar[str] = "wan"
    schedule: ClassVar[str] = "Wan"
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": Part("text_encoder", "transformers:UMT5EncoderModel", ("tokenizer",)),
        "vae": Part("vae", "diffusers:AutoencoderKLWan"),
        "dit": Part("transformer", "diffusers:WanTransformer3DModel"),
    }
    companions: ClassVar[Mapping[str, Part]] = {"tokenizer": Part("tokenizer", "transformers:AutoTokenizer")}
    column_params: ClassVar[Mapping[str, str]] = {"input_video": "video", "prompt": "prompt"}
    file_params: ClassVar[tuple[str, ...]] = ("input_video",)
    video_params: ClassVar[tuple[str, ...]] = ("input_video",)
    default_num_frames: ClassVar[int] = 81
    padded_params: ClassVar[Mapping[str, str]] = {"prompt_embeds": "prompt_embeds_mask"}
    collate_outputs: ClassVar[tuple[str, ...]] = ("prompt_embeds_mask",)
    lora_prefix: ClassVar[str] = "diffusion_model."
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    lora_aliases: ClassVar[Mapping[str, str]] = {
        "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
        "k_img": "add_k_proj", "v_img": "add_v_proj",
    }  # fmt: skip
    condition_channels: ClassVar[int] = 0
    """Channels that the transformer takes beside the latents."""

    text_encoder: Any
    tokenizer: Any
    vae: Any
    dit: Any

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype, time_division_factor=4, time_division_remainder=1)
        self.latent_channels = 16
        self.vae_scale_factor = 8
        self.units = [
            WanVideoUnit_ShapeChecker(),
            WanVideoUnit_NoiseInitializer(),
            WanVideoUnit_InputVideoEmbedder(),
            FlowMatchUnit_InitialLatents(),
            WanVideoUnit_PromptEmbedder(),
        ]
        self.model_fn = model_fn

    def configure(self, source: ModelSource) -> None:
        """Take the geometry and the sampling shift from configuration files.

        Raises:
            PipelineError: the transformer is that of another kind of Wan model.
        """
        index = source.index()
        if index.get("expand_timesteps") or index.get("boundary_ratio") is not None:
            raise PipelineError(
                f"{source.model_id} is a Wan 2.2 model (two transformers, or a timestep for each token), which is not "
                "supported; use a Wan 2.1 model, e.g. Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
            )
        vae = source.config("vae")
        self.latent_channels = int(vae.get("z_dim", self.latent_channels))
        self.vae_scale_factor = int(vae.get("scale_factor_spatial", self.vae_scale_factor))
        self.time_division_factor = int(vae.get("scale_factor_temporal", 4))
        self.height_division_factor = self.width_division_factor = 2 * self.vae_scale_factor
        expected = self.latent_channels + self.condition_channels
        transformer = source.config("transformer")
        found = int(transformer.get("in_channels", expected))
        if found != expected:
            raise PipelineError(
                f"the transformer of {source.model_id} takes {found} channels, that of the family {self.family} "
                f"{expected}; text to video is --family wan, image to video --family wan_i2v"
            )
        if transformer.get("pos_embed_seq_len") is not None:
            raise PipelineError(
                f"{source.model_id} makes videos between a first and a last frame (FLF2V), which is not supported; use "
                "an image-to-video model, e.g. Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
            )
        scheduler = scheduler_config(source) or {}
        if "flow_shift" in scheduler:  # Wan's UniPC, whose shift diffusers' Euler scheduler would not know
            self.scheduler = FlowMatchScheduler(self.schedule, config={"shift": float(scheduler["flow_shift"])})

    def original_lora_key(self, key: str) -> str:
        for pattern, name in _ORIGINAL_NAMES:
            key = re.sub(pattern, name, key)
        return key

    def training_settings(self) -> dict[str, Any]:
        return {**super().training_settings(), "tile_size": TILE_SIZE, "tile_stride": TILE_STRIDE}

    # ---------------------------------------------------------------- helpers of units

    def initial_noise(self, shape: Sequence[int], seed: int | None, rand_device: str = "cpu") -> Tensor:
        """In fp32, as diffusers draws it for Wan and keeps it between the steps: the same seed gives the same video."""
        return self.generate_noise(shape, seed, rand_device, torch_dtype=torch.float32)

    def preprocess_video(self, video: Video) -> Tensor:
        """Images, or uint8 pixels (F, H, W, 3), as (1, 3, F, H, W) in [-1, 1] and the pipeline's dtype."""
        frames = [self.preprocess_image(frame)[:, :, None] for frame in video]
        if not frames:
            raise PipelineError("a video of no frames; give at least one")
        return torch.cat(frames, dim=2)

    def vae_output_to_video(self, vae_output: Tensor) -> list[Image.Image]:
        """Pixels (1, 3, F, H, W) in [-1, 1] as PIL images."""
        return [self.vae_output_to_image(frame) for frame in vae_output.unbind(2)]

    def encode_video(self, pixels: Tensor, *, tiled: bool, tile_size: int, tile_stride: int) -> Tensor:
        """Pixels (B, 3, F, H, W) -> normalised latents (B, C, (F - 1)/4 + 1, H/8, W/8): the distribution's mode."""
        with causal_vae_tiling(self.vae, tiled, tile_size * self.vae_scale_factor, tile_stride * self.vae_scale_factor):
            moments = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        mean, std = self._latent_statistics()
        latents: Tensor = (moments.mode().float() - mean) / std
        return latents.to(self.torch_dtype)

    def decode_latents(self, latents: Tensor, *, tiled: bool, tile_size: int, tile_stride: int) -> Tensor:
        """Inverse of `encode_video`: pixels (B, 3, F, H, W), about [-1, 1]."""
        mean, std = self._latent_statistics()
        raw = (latents.float() * std + mean).to(self.vae.dtype)
        with causal_vae_tiling(self.vae, tiled, tile_size * self.vae_scale_factor, tile_stride * self.vae_scale_factor):
            pixels: Tensor = self.vae.decode(raw).sample
        return pixels

    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """One unpadded embedding (1, L, D) a prompt; L is at most TEXT_TOKENS."""
        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="longest", max_length=TEXT_TOKENS, truncation=True, return_attention_mask=True, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        embeds = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        lengths = tokens.attention_mask.sum(dim=1).tolist()
        for prompt, length in zip(prompts, lengths, strict=True):
            if length == TEXT_TOKENS and (whole := len(self.tokenizer(clean_prompt(prompt)).input_ids)) > length:
                warn_of_cut(prompt, whole, TEXT_TOKENS)
        return [embeds[i : i + 1, :length].clone().to(self.torch_dtype) for i, length in enumerate(lengths)]

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Shape of one sample's latents (1, C, frames, h, w)."""
        frames = (num_frames - 1) // (self.time_division_factor or 1) + 1
        return (1, self.latent_channels, frames, height // self.vae_scale_factor, width // self.vae_scale_factor)

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, fp32, (1, C, 1, 1, 1)."""
        config = self.vae.config
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std

    # ---------------------------------------------------------------- sampling

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        cfg_scale: float = 5.0,
        input_image: Image.Image | None = None,
        input_video: Video | None = None,
        denoising_strength: float = 1.0,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        seed: int | None = None,
        rand_device: str = "cpu",
        num_inference_steps: int = 50,
        tiled: bool = False,
        tile_size: int = TILE_SIZE,
        tile_stride: int = TILE_STRIDE,
        output_type: str = "pil",
        progress_bar_cmd: ProgressBar = no_progress_bar,
    ) -> list[Image.Image] | Tensor:
        """Generate one video, by the units that training uses, with Euler steps.

        Args:
            cfg_scale: classifier-free guidance against `negative_prompt`; 1 turns it off and halves the time.
            input_image: image to video only: the first frame.
            input_video: start from this video, of the size asked for, noised by `denoising_strength` in (0, 1].
            seed: decides the noise; None: another video each time.
            output_type: "pil" for a list of frames, or "latent" for normalised latents (1, C, frames, h, w).
            progress_bar_cmd: wraps the steps, e.g. tqdm.

        Raises:
            PipelineError: a size that does not divide, an unknown output type, a model that is not loaded.
        """
        check_output_type(output_type)
        if input_image is not None and not self.condition_channels:
            raise PipelineError(f"the family {self.family} makes videos from text; input_image needs --family wan_i2v")
        self.check_resize_height_width(height, width, num_frames)
        self.scheduler.set_timesteps(num_inference_steps, denoising_strength)
        shared: dict[str, Any] = {
            "cfg_scale": cfg_scale, "height": height, "width": width, "num_frames": num_frames, "seed": seed,
            "rand_device": rand_device, "tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride,
        }  # fmt: skip
        given = {"input_image": input_image, "input_video": input_video}
        shared |= {name: value for name, value in given.items() if value is not None}
        start = UnitState(shared, {"prompt": prompt}, {"negative_prompt": negative_prompt})
        latents = self.sample_latents(start, progress_bar_cmd=progress_bar_cmd)
        if output_type == "latent":
            return latents
        self.load_models_to_device(("vae",))
        return self.vae_output_to_video(
            self.decode_latents(latents, tiled=tiled, tile_size=tile_size, tile_stride=tile_stride)
        )


def clean_prompt(prompt: str) -> str:
    """The prompt as Wan was trained on it: broken characters mended by ftfy, HTML unescaped, white space made one."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    if importlib.util.find_spec("ftfy") is None:  # diffusers would leave it out in silence, and embed another text
        raise PipelineError("Wan's prompts are cleaned by ftfy, which is not installed: pip install ftfy")
    cleaned: str = prompt_clean(prompt)
    return cleaned
