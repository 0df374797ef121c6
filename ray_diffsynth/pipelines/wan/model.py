"""How Wan's transformer is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ray_diffsynth.diffusion.gradient_checkpoint import enable_checkpointing

TEXT_TOKENS = 512
"""The transformer's cross-attention has no mask: the text is always padded with zeros to this length."""


def model_fn(
    *,
    dit: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    y: Tensor | None = None,
    image_embeds: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """The velocity noise - x0, in the shape of `latents`.

    Args:
        latents: (B, C, frames, h, w), h and w even.
        timestep: 1000 * sigma, (B,) or (1,), fp32.
        prompt_embeds: (B, L, D), zeros where a text is shorter.
        y: condition of image to video, (B, 20, frames, h, w): mask and latents.
        image_embeds: its first frame as CLIP sees it, (B, tokens, D).
    """
    enable_checkpointing(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    text = torch.nn.functional.pad(prompt_embeds, (0, 0, 0, TEXT_TOKENS - prompt_embeds.shape[1]))
    prediction: Tensor = dit(
        hidden_states=latents if y is None else torch.cat([latents, y], dim=1),
        timestep=timestep.expand(latents.shape[0]),
        encoder_hidden_states=text,
        encoder_hidden_states_image=image_embeds,
        return_dict=False,
    )[0]
    return prediction
