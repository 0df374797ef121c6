"""Z-Image on diffusers' and transformers' own classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_diffsynth.diffusion.gradient_checkpoint import enable_checkpointing
from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.pipelines.shared.image_pipeline import MAX_SEQUENCE_LENGTH, SamplingDefaults
from ray_diffsynth.pipelines.shared.image_units import ImageUnit_PromptEmbedder, image_units
from ray_diffsynth.pipelines.shared.kl_vae import KLImagePipeline
from ray_diffsynth.pipelines.shared.text import chat_texts, tokenize


class ZImagePipeline(KLImagePipeline):
    """Z-Image. Prompt embeddings are (1, L, D), unpadded; a batch of them is a list: the transformer pads and masks.

    `cfg_scale` is the usual nega + cfg_scale * (posi - nega); diffusers' `guidance_scale` here is one less.
    """

    version = 1
    family: ClassVar[str] = "z_image"
    schedule: ClassVar[str] = "Z-Image"
    defaults: SamplingDefaults = SamplingDefaults(num_inference_steps=8)
    # diffusers samples this family in fp32, whatever the dtype of the transformer.
    noise_dtype: ClassVar[torch.dtype | None] = torch.float32
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": Part("text_encoder", "transformers:Qwen3Model", ("tokenizer",)),
        "vae": Part("vae", "diffusers:AutoencoderKL"),
        "dit": Part("transformer", "diffusers:ZImageTransformer2DModel"),
    }
    companions: ClassVar[Mapping[str, Part]] = {"tokenizer": Part("tokenizer", "transformers:Qwen2Tokenizer")}
    listed_params: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    lora_prefix: ClassVar[str] = "diffusion_model."
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")

    text_encoder: Any
    tokenizer: Any

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.units = [*image_units(), ImageUnit_PromptEmbedder()]
        self.model_fn = model_fn

    def encode_prompts(self, prompts: Sequence[str], *, max_sequence_length: int = MAX_SEQUENCE_LENGTH) -> list[Tensor]:
        """One unpadded embedding (1, L, D) a prompt: Qwen3's last hidden state but one."""
        texts = chat_texts(self.tokenizer, prompts, thinking=True)
        # Attention is causal and the padding comes last, so that the longest of the batch is enough.
        ids, mask = tokenize(self.tokenizer, texts, max_length=max_sequence_length, padding="longest", prompts=prompts)
        ids, mask = ids.to(self.device), mask.to(self.device).bool()
        hidden = self.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return [row[kept][None].to(self.torch_dtype) for row, kept in zip(hidden, mask, strict=True)]


def model_fn(
    *,
    dit: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Sequence[Tensor],
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """The velocity noise - x0, fp32, in the shape of `latents`.

    Args:
        latents: (B, C, h, w), h and w even.
        timestep: 1000 * sigma, (B,) or (1,), fp32; the transformer counts from noise (0) to image (1).
        prompt_embeds: B tensors (1, L_i, D), unpadded.
    """
    enable_checkpointing(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    time = 1 - timestep.expand(len(latents)) / 1000
    predictions = dit(list(latents[:, :, None]), time, [embeds[0] for embeds in prompt_embeds], return_dict=False)[0]
    # The transformer predicts x0 - noise.
    return -torch.stack(list(predictions))[:, :, 0].float()
