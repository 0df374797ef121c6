"""FLUX.1 (dev, schnell, Krea and others of the architecture) on diffusers' and transformers' own classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_diffsynth.config.options import split_names
from ray_diffsynth.diffusion.gradient_checkpoint import enable_checkpointing
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.pipelines.core.unit import PipelineUnit
from ray_diffsynth.pipelines.shared.image_pipeline import MAX_SEQUENCE_LENGTH, SamplingDefaults
from ray_diffsynth.pipelines.shared.image_units import ImageUnit_PromptEmbedder, image_units
from ray_diffsynth.pipelines.shared.kl_vae import KLImagePipeline
from ray_diffsynth.pipelines.shared.packing import grid_positions, pack_latents, unpack_latents
from ray_diffsynth.pipelines.shared.text import tokenize

_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"


def _each(blocks: str, *layers: str) -> str:
    """The layers of each block, as --lora_target_modules takes them."""
    return ",".join(f"{blocks}.*.{layer}" for layer in layers)


class FluxPipeline(KLImagePipeline):
    """FLUX.1. Prompt embeddings of T5 are (1, 512, D), padding included: the transformer attends to it unmasked."""

    version = 1
    family: ClassVar[str] = "flux"
    schedule: ClassVar[str] = "FLUX.1"
    defaults: SamplingDefaults = SamplingDefaults(embedded_guidance=3.5)
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": Part("text_encoder", "transformers:CLIPTextModel", ("tokenizer",)),
        "text_encoder_2": Part("text_encoder_2", "transformers:T5EncoderModel", ("tokenizer_2",)),
        "vae": Part("vae", "diffusers:AutoencoderKL"),
        "dit": Part("transformer", "diffusers:FluxTransformer2DModel"),
    }
    companions: ClassVar[Mapping[str, Part]] = {
        "tokenizer": Part("tokenizer", "transformers:CLIPTokenizer"),
        "tokenizer_2": Part("tokenizer_2", "transformers:T5TokenizerFast"),
    }
    lora_prefix: ClassVar[str] = "transformer."
    # What DiffSynth-Studio's names mean here. It fuses q, k, v (and the MLP of a single block); diffusers does not, so
    # that each part gets a LoRA of its own. A bare proj_out would also match the layer behind the last block.
    lora_aliases: ClassVar[Mapping[str, str]] = {
        "a_to_qkv": _each(_DOUBLE, "attn.to_q", "attn.to_k", "attn.to_v"),
        "b_to_qkv": _each(_DOUBLE, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "a_to_out": _each(_DOUBLE, "attn.to_out.0"),
        "b_to_out": _each(_DOUBLE, "attn.to_add_out"),
        "ff_a.0": _each(_DOUBLE, "ff.net.0.proj"),
        "ff_a.2": _each(_DOUBLE, "ff.net.2"),
        "ff_b.0": _each(_DOUBLE, "ff_context.net.0.proj"),
        "ff_b.2": _each(_DOUBLE, "ff_context.net.2"),
        "norm1_a.linear": _each(_DOUBLE, "norm1.linear"),
        "norm1_b.linear": _each(_DOUBLE, "norm1_context.linear"),
        "norm.linear": _each(_SINGLE, "norm.linear"),
        "proj_out": _each(_SINGLE, "proj_out"),
        "to_qkv_mlp": _each(_SINGLE, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    }
    # DiffSynth-Studio's own list: every linear layer of the blocks.
    lora_targets: ClassVar[tuple[str, ...]] = split_names(",".join(lora_aliases.values()))

    text_encoder: Any
    text_encoder_2: Any
    tokenizer: Any
    tokenizer_2: Any

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.units = [*image_units(), FluxUnit_PooledEmbedder(), ImageUnit_PromptEmbedder("text_encoder_2")]
        self.model_fn = model_fn

    def configure(self, source: ModelSource) -> None:
        """The geometry of the latents. Raises PipelineError for a model that takes a further image."""
        super().configure(source)
        expected = 4 * self.latent_channels
        found = int(source.config("transformer").get("in_channels", expected))
        if found != expected:
            raise PipelineError(
                f"the transformer of {source.model_id} takes {found} channels, that of the family {self.family} "
                f"{expected}: FLUX.1 Fill, Canny and Depth, which take a further image, are not supported; use "
                "FLUX.1 dev, schnell or Krea-dev"
            )

    def training_settings(self) -> dict[str, Any]:
        # Guidance 1 while training, as DiffSynth-Studio and diffusers' scripts do.
        return {**super().training_settings(), "embedded_guidance": 1.0}

    def sampling_settings(self) -> dict[str, Any]:
        return {**super().sampling_settings(), "embedded_guidance": self.defaults.embedded_guidance}

    def pool_prompts(self, prompts: Sequence[str]) -> Tensor:
        """CLIP's pooled embeddings (B, D). It sees 77 tokens of a prompt; T5 gets the whole."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        pooled: Tensor = self.text_encoder(tokens.input_ids.to(self.device)).pooler_output
        return pooled.to(self.torch_dtype)

    def encode_prompts(self, prompts: Sequence[str], *, max_sequence_length: int = MAX_SEQUENCE_LENGTH) -> list[Tensor]:
        """T5's embedding (1, max_sequence_length, D) of each prompt, without a mask, as the model was trained."""
        ids, _ = tokenize(self.tokenizer_2, prompts, max_length=max_sequence_length, padding="max_length")
        embeds: Tensor = self.text_encoder_2(ids.to(self.device)).last_hidden_state
        return [single[None].to(self.torch_dtype, copy=True) for single in embeds]


class FluxUnit_PooledEmbedder(PipelineUnit):
    """`prompt` (and `negative_prompt`) -> CLIP's pooled embedding (1, D)."""

    version = 1

    def __init__(self) -> None:
        super().__init__(
            seperate_cfg=True,
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            output_params=("pooled_prompt_embeds",),
            onload_model_names=("text_encoder",),
        )

    def process(self, pipe: FluxPipeline, prompt: str) -> dict[str, Any]:
        return self.process_batch(pipe, [{"prompt": prompt}])[0]

    def process_batch(self, pipe: FluxPipeline, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        pipe.load_models_to_device(("text_encoder",))
        pooled = pipe.pool_prompts([inputs["prompt"] for inputs in batch])
        return [{"pooled_prompt_embeds": pooled[i : i + 1].clone()} for i in range(len(batch))]


def model_fn(
    *,
    dit: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    embedded_guidance: float = 1.0,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """The velocity noise - x0, in the shape of `latents`.

    Args:
        latents: (B, C, h, w), h and w even; one size a batch, since one rotary table serves it.
        timestep: 1000 * sigma, (B,) or (1,), fp32.
        prompt_embeds: (B, L, D) of T5; pooled_prompt_embeds: (B, D') of CLIP.
        embedded_guidance: input of a guidance-distilled transformer (dev); others (schnell) have none.
    """
    batch, _, height, width = latents.shape
    enable_checkpointing(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    guidance = latents.new_full((batch,), embedded_guidance, dtype=torch.float32)
    prediction = dit(
        hidden_states=pack_latents(latents),
        timestep=timestep.expand(batch) / 1000,
        guidance=guidance if dit.config.guidance_embeds else None,
        pooled_projections=pooled_prompt_embeds,
        encoder_hidden_states=prompt_embeds,
        txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=latents.device),
        img_ids=grid_positions(1, height // 2, width // 2, device=latents.device),
        return_dict=False,
    )[0]
    return unpack_latents(prediction, height, width)
