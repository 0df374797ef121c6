"""The random-weight model for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

from ray_diffsynth.demo.tiny import build_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=0)


def test_it_has_the_standard_layout_and_no_pickle(tiny: Path) -> None:
    assert {p.name for p in tiny.iterdir()} == {
        "model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae",
    }  # fmt: skip
    assert {p.suffix for p in tiny.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_it_generates(tiny: Path) -> None:
    pipe = QwenImagePipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    assert sum(p.numel() for p in pipe.transformer.parameters()) < 200_000
    assert pipe.vae.config.latents_mean != [0.0] * 16
    images = [
        pipe(
            "a zorp on a red background",
            height=64,
            width=48,
            num_inference_steps=2,
            true_cfg_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]
        for _ in range(2)
    ]
    assert images[0].shape == (64, 48, 3)
    assert np.isfinite(images[0]).all()
    assert np.array_equal(images[0], images[1])


def test_the_seed_decides_every_byte(tiny: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    same, other = build_tiny_model(tmp_path / "same", seed=0), build_tiny_model(tmp_path / "other", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    for file in (p for p in tiny.rglob("*") if p.is_file()):
        assert file.read_bytes() == (same / file.relative_to(tiny)).read_bytes(), file
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tiny / weights).read_bytes() != (other / weights).read_bytes()
