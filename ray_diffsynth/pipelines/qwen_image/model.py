"""How Qwen-Image's transformer is called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ray_diffsynth.diffusion.gradient_checkpoint import enable_checkpointing
from ray_diffsynth.pipelines.shared.packing import pack_latents, unpack_latents


def model_fn(
    *,
    dit: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    prompt_embeds_mask: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """The velocity noise - x0, in the shape of `latents`.

    Args:
        latents: (B, C, h, w), h and w even; one size a batch, since one rotary table serves it.
        timestep: 1000 * sigma, (B,) or (1,), fp32.
        prompt_embeds: (B, L, D); prompt_embeds_mask: bool (B, L), None if nothing is padded.
    """
    batch, _, height, width = latents.shape
    enable_checkpointing(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    prediction = dit(
        hidden_states=pack_latents(latents),
        timestep=timestep.expand(batch) / 1000,
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_mask=prompt_embeds_mask,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    return unpack_latents(prediction, height, width)
