"""All that the DiT's training reads, computed once: normalised latents and one embedding per distinct caption."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from demo_recipe.vae import encode
from ray_diffsynth.demo.captions import canonical, caption
from ray_diffsynth.demo.draw import draw_image
from ray_diffsynth.demo.text_encoder import build_text_encoder
from ray_diffsynth.demo.tokenizer import build_tokenizer

logger = logging.getLogger("demo_recipe")
EMPTY = " "  # the negative prompt, and what a dropped caption becomes


@dataclass(frozen=True)
class LatentsConfig:
    """`images` drawn with the seed, each with its canonical caption and `varied` ones from the whole grammar."""

    seed: int = 10
    images: int = 8_000
    varied: int = 2


@dataclass(frozen=True)
class Latents:
    """latents: (N, 16, 8, 8), normalised; captions: (N, K) rows of `prompts`; embeds: per prompt (length, hidden)."""

    latents: Tensor
    captions: Tensor
    prompts: list[str]
    embeds: list[Tensor]


@torch.no_grad()
def embed_prompts(pipe: QwenImagePipeline, prompts: list[str], batch: int = 256) -> list[Tensor]:
    """The pipeline's own embedding of each prompt, unpadded: (length, hidden)."""
    out: list[Tensor] = []
    for start in range(0, len(prompts), batch):
        embeds, mask = pipe.encode_prompt(prompts[start : start + batch], device="cpu")
        rows = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        out += [e[m].clone() for e, m in zip(embeds, rows, strict=True)]
    return out


def text_pipeline() -> QwenImagePipeline:
    """A pipeline with nothing but the text encoder and its tokenizer."""
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(tokenizer)
    return QwenImagePipeline(scheduler=None, vae=None, text_encoder=encoder, tokenizer=tokenizer, transformer=None)


def set_statistics(vae: AutoencoderKLQwenImage, latents: Tensor) -> None:
    """Write mean and deviation per channel of (N, C, H, W) latents into the VAE's config, where pipelines look."""
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean((0, 2, 3)).tolist()],
        latents_std=[round(v, 5) for v in latents.std((0, 2, 3)).tolist()],
    )


def normalize(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """(latents − mean) / deviation, by the VAE's config."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (latents - mean) / std


def prepare_latents(path: Path, vae: AutoencoderKLQwenImage, config: LatentsConfig) -> None:
    """Draw, encode and embed; set the VAE's latent statistics; write one safetensors file."""
    images = [draw_image(config.seed, i) for i in range(config.images)]
    latents = encode(vae, np.stack([p.pixels for p in images]))
    set_statistics(vae, latents)
    texts = [
        [canonical(p.scene)]
        + [caption(p.scene, np.random.default_rng([config.seed, i, k])) for k in range(config.varied)]
        for i, p in enumerate(images)
    ]
    prompts = [EMPTY, *sorted({text for row in texts for text in row})]
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    embeds = embed_prompts(text_pipeline(), prompts)
    logger.info("latents %s, %d distinct prompts", tuple(latents.shape), len(prompts))
    tensors = {
        "latents": normalize(vae, latents).half().contiguous(),
        "captions": torch.tensor([[row_of[text] for text in row] for row in texts], dtype=torch.int32),
        "lengths": torch.tensor([len(e) for e in embeds], dtype=torch.int32),
        "embeds": torch.cat(embeds),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"prompts": json.dumps(prompts)})


def load_latents(path: Path) -> Latents:
    """Read what `prepare_latents` wrote."""
    with safe_open(path, "pt") as file:
        lengths = file.get_tensor("lengths").tolist()
        embeds = list(file.get_tensor("embeds").split(lengths))
        prompts = json.loads(file.metadata()["prompts"])
        return Latents(file.get_tensor("latents").float(), file.get_tensor("captions").long(), prompts, embeds)
