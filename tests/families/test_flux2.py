"""What FLUX.2-klein alone has: statistics of a BatchNorm, positions on four axes, a schedule by size and steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

from ray_diffsynth.models.lora import match_targets
from ray_diffsynth.pipelines.flux2 import TEXT_LAYERS, Flux2KleinPipeline
from ray_diffsynth.pipelines.shared.packing import grid_positions


def test_latents_are_made_whole_again(model_folder: Callable[[str], Path]) -> None:
    pipe = Flux2KleinPipeline.from_pretrained(model_folder("flux2"), models=["vae"], torch_dtype=torch.float32)
    raw = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    normal = pipe.normalise(raw)
    assert normal.shape == (2, 16, 2, 3)
    torch.testing.assert_close(pipe.denormalise(normal), raw)
    assert (pipe.latent_channels, pipe.vae_scale_factor, pipe.height_division_factor) == (16, 16, 16)
    # The statistics are the file's, in training mode too: nothing here calls the norm itself.
    before = pipe.vae.bn.running_mean.clone()
    pipe.vae.train()
    pipe.encode_images(torch.zeros(1, 3, 32, 32), tiled=False, tile_size=128, tile_stride=64)
    assert torch.equal(pipe.vae.bn.running_mean, before)


def test_positions_equal_diffusers() -> None:
    theirs = diffusers.Flux2KleinPipeline
    assert torch.equal(grid_positions(1, 2, 3, 1), theirs._prepare_latent_ids(torch.zeros(1, 4, 2, 3))[0].float())
    assert torch.equal(grid_positions(1, 1, 1, 5), theirs._prepare_text_ids(torch.zeros(1, 5, 8))[0].float())
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(1, 2, 3, torch.device("cpu"), torch.float32)
    assert torch.equal(grid_positions(1, 2, 3), ids)


def test_the_output_of_the_single_blocks_is_a_target(model_folder: Callable[[str], Path]) -> None:
    pipe = Flux2KleinPipeline.from_pretrained(model_folder("flux2"), models=["dit"], torch_dtype=torch.float32)
    assert match_targets(pipe.dit, "to_out") == tuple(f"single_transformer_blocks.{n}.attn.to_out" for n in (0, 1))
    every = [path for path in match_targets(pipe.dit, "all-linear") if "transformer_blocks." in path]
    assert set(match_targets(pipe.dit, pipe.lora_targets)) == set(every)


def test_the_hidden_states_are_those_of_diffusers() -> None:
    encode = inspect.signature(diffusers.Flux2KleinPipeline.encode_prompt).parameters
    assert encode["text_encoder_out_layers"].default == TEXT_LAYERS
