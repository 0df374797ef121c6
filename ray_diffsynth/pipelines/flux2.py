"""FLUX.2-klein (distilled and base) on diffusers' and transformers' own classes: text to image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_diffsynth.diffusion.gradient_checkpoint import enable_checkpointing
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.pipelines.shared.image_pipeline import MAX_SEQUENCE_LENGTH, SamplingDefaults
from ray_diffsynth.pipelines.shared.image_units import ImageUnit_PromptEmbedder, image_units
from ray_diffsynth.pipelines.shared.kl_vae import KLImagePipeline
from ray_diffsynth.pipelines.shared.packing import grid_positions, patchify, unpatchify
from ray_diffsynth.pipelines.shared.text import chat_texts, tokenize

DISTILLED = SamplingDefaults(num_inference_steps=4)
"""Of a model whose model_index.json says `is_distilled`: klein, not klein-base."""
TEXT_LAYERS = (9, 18, 27)  # hidden states of Qwen3 that make an embedding; diffusers' `text_encoder_out_layers`


class Flux2KleinPipeline(KLImagePipeline):
    """FLUX.2-klein. Latents are (B, 4C, h, w), one a token: the VAE's, 2 x 2 in one, in the VAE's BatchNorm statistics.

    Prompt embeddings are (1, 512, 3D), padding included: the transformer attends to it unmasked.
    """

    version = 1
    family: ClassVar[str] = "flux2"
    schedule: ClassVar[str] = "FLUX.2"
    defaults: SamplingDefaults = SamplingDefaults(num_inference_steps=50, cfg_scale=4.0)
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": Part("text_encoder", "transformers:Qwen3ForCausalLM", ("tokenizer",)),
        "vae": Part("vae", "diffusers:AutoencoderKLFlux2"),
        "dit": Part("transformer", "diffusers:Flux2Transformer2DModel"),
    }
    companions: ClassVar[Mapping[str, Part]] = {"tokenizer": Part("tokenizer", "transformers:Qwen2Tokenizer")}
    lora_prefix: ClassVar[str] = "diffusion_model."
    # `to_out` is a layer in the single blocks alone: in the double blocks it is a list, whose layer is `to_out.0`.
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "linear_in", "linear_out", "to_qkv_mlp_proj", "to_out",
    )  # fmt: skip

    text_encoder: Any
    tokenizer: Any

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.latent_channels, self.vae_scale_factor = 128, 16
        self.units = [*image_units(), ImageUnit_PromptEmbedder()]
        self.model_fn = model_fn

    def configure(self, source: ModelSource) -> None:
        """The latents' geometry, four of the VAE's in one, and the defaults. Raises PipelineError for FLUX.2-dev."""
        if source.config("transformer").get("guidance_embeds"):
            raise PipelineError(
                f"the transformer of {source.model_id} takes the guidance as an input: FLUX.2-dev, which has another "
                "text encoder too, is not supported; use a FLUX.2-klein model"
            )
        if source.index().get("is_distilled"):
            self.defaults = DISTILLED
        self.latent_channels, self.vae_scale_factor = 32, 8
        super().configure(source)
        self.latent_channels, self.vae_scale_factor = 4 * self.latent_channels, 2 * self.vae_scale_factor

    def normalise(self, raw: Tensor) -> Tensor:
        mean, std = self._latent_statistics()
        return (patchify(raw) - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_statistics()
        return unpatchify(latents * std + mean)

    def time_shift(self, tokens: int, steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(image_seq_len=tokens, num_steps=steps))

    def encode_prompts(self, prompts: Sequence[str], *, max_sequence_length: int = MAX_SEQUENCE_LENGTH) -> list[Tensor]:
        """One embedding (1, max_sequence_length, 3D) a prompt: three hidden states of Qwen3 side by side."""
        texts = chat_texts(self.tokenizer, prompts, thinking=False)
        ids, mask = tokenize(
            self.tokenizer, texts, max_length=max_sequence_length, padding="max_length", prompts=prompts
        )
        # The base model: nobody reads the logits.
        hidden = self.text_encoder.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        embeds = torch.cat([hidden[layer] for layer in TEXT_LAYERS], dim=-1).to(self.torch_dtype)
        return [single[None].clone() for single in embeds]

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the patchified latents, fp32, (1, 4C, 1, 1)."""
        norm = self.vae.bn
        mean = norm.running_mean.float().view(1, -1, 1, 1)
        std = torch.sqrt(norm.running_var.float().view(1, -1, 1, 1) + self.vae.config.batch_norm_eps)
        return mean, std


def model_fn(
    *,
    dit: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """The velocity noise - x0, in the shape of `latents`.

    Args:
        latents: (B, 4C, h, w); one size a batch, since one rotary table serves it.
        timestep: 1000 * sigma, (B,) or (1,), fp32.
        prompt_embeds: (B, L, 3D), padding included.
    """
    batch, _, height, width = latents.shape
    enable_checkpointing(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    prediction = dit(
        hidden_states=latents.flatten(2).transpose(1, 2),
        timestep=timestep.expand(batch) / 1000,
        guidance=None,
        encoder_hidden_states=prompt_embeds,
        # Four axes: image, row, column, word.
        txt_ids=grid_positions(1, 1, 1, prompt_embeds.shape[1], device=latents.device),
        img_ids=grid_positions(1, height, width, 1, device=latents.device),
        return_dict=False,
    )[0]
    velocity: Tensor = prediction.transpose(1, 2).reshape(latents.shape)
    return velocity
