"""Tiny components of the Wan models, and what both of their cases share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.families.cases import PROMPTS, Sampling
from tests.families.tiny.parts import t5_tokenizer

HEIGHT, WIDTH, FRAMES = 32, 48, 5
NEGATIVE = "ugly, blurred"


def components(*, condition_channels: int = 0, image_dim: int | None = None) -> dict[str, Any]:
    """Everything but the image encoder, random, with the real VAE's geometry (8x, 4 frames to one)."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16 + condition_channels,
        out_channels=16, text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=image_dim,
        added_kv_proj_dim=24 if image_dim else None,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return {
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder": UMT5EncoderModel(text).eval(),
        "tokenizer": tokenizer,
        "transformer_2": None,
    }


def load(cls: Any, root: Path) -> Any:
    """diffusers' pipeline with Wan's own sigmas, which its UniPC has too: Euler steps alone take others."""
    pipe = cls.from_pretrained(str(root), dtype=torch.float32)
    set_timesteps = pipe.scheduler.set_timesteps

    def wans(num_inference_steps: int, device: Any = None) -> None:
        set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), device=device)

    pipe.scheduler.set_timesteps = wans
    return pipe


def video(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


def row(index: int) -> dict[str, Any]:
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    return {"input_video": video(index), "prompt": PROMPTS[index], **size}


def latents(pipe: Any, output: Tensor) -> Tensor:
    return output


def normalised(pipe: Any, pixels: Tensor) -> Tensor:
    z = pipe.vae.encode(pixels).latent_dist.mode()
    config = pipe.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    return (z - mean) / std


def encode(pipe: Any, row: Mapping[str, Any]) -> dict[str, Tensor]:
    pixels = torch.from_numpy(row["input_video"]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    embeds, _ = pipe.encode_prompt(row["prompt"], do_classifier_free_guidance=False, max_sequence_length=512)
    length = len(pipe.tokenizer(row["prompt"]).input_ids)
    return {"input_latents": normalised(pipe, pixels), "prompt_embeds": embeds[:, :length]}


def samplings(**more: Any) -> tuple[Sampling, ...]:
    """`more`: arguments of both sides whose name is the same, or (ours, theirs)."""
    common = {"prompt": PROMPTS[1], "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 3}
    ours, theirs = ({**common, **more.get(side, {})} for side in ("ours", "theirs"))
    guided = {"negative_prompt": NEGATIVE}
    return (
        Sampling({**ours, "cfg_scale": 1.0}, {**theirs, "guidance_scale": 1.0}),
        Sampling({**ours, **guided, "cfg_scale": 5.0}, {**theirs, **guided, "guidance_scale": 5.0}),
    )
