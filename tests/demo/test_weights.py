"""The model that ships with the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors import safe_open

from demo_recipe.vae import decode, encode, held_out_images, psnr
from ray_diffsynth.demo import demo_model_path
from ray_diffsynth.demo.captions import Scene, canonical
from ray_diffsynth.demo.draw import draw_image
from ray_diffsynth.demo.evaluate import sample, score


@pytest.fixture(scope="module")
def pipe() -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(demo_model_path(), dtype=torch.float32)


def test_it_is_small_bf16_and_without_pickle() -> None:
    files = [file for file in demo_model_path().rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118
        elif file.suffix == ".json":
            assert "_name_or_path" not in file.read_text()


def test_the_vae_keeps_shapes_creature_and_style(pipe: QwenImagePipeline) -> None:
    floors = {"shapes": 33, "creature": 28, "style": 30.5}  # dB, just below the model card's figures
    measured = {kind: psnr(pipe.vae, images) for kind, images in held_out_images(8).items()}
    assert all(measured[kind] >= floor for kind, floor in floors.items()), measured


def test_the_fast_path_is_the_class_itself(pipe: QwenImagePipeline) -> None:
    pixels = [draw_image(0, 0).pixels]
    x = torch.from_numpy(pixels[0].copy()).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(x).latent_dist.mode()
        again = pipe.vae.decode(latents).sample[0, :, 0].clamp(-1, 1)
    assert torch.allclose(encode(pipe.vae, pixels), latents[:, :, 0], atol=1e-4)
    shown = (again.permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(decode(pipe.vae, latents[:, :, 0])[0] - shown).max() < 1


def test_it_draws_what_it_is_told(pipe: QwenImagePipeline) -> None:
    told = [("square", "red", "white"), ("circle", "blue", "yellow"), ("heart", "white", "purple")]
    scenes = [Scene(shape, color, background, "large", 0.7, 0.0, 0.0) for shape, color, background in told]
    result = score(sample(pipe, [canonical(scene) for scene in scenes], steps=12), scenes)
    assert result.background == result.color == 1.0
    assert result.shape == 1.0
