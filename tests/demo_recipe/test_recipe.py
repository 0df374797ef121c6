"""The recipe's parts, on small inputs."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from demo_recipe.dit import Batches, DitConfig, build_dit, flow_loss, rate, velocity
from demo_recipe.encoder import blocks, components, projections
from demo_recipe.generic import decoder_image, encoder_image
from demo_recipe.latents import Latents
from demo_recipe.state import TrainingState
from demo_recipe.vae import build_vae, encode, to_tensor
from ray_diffsynth.demo.draw import draw_image


def _train(folder: Path, stop: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
    average = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    state, done = TrainingState(folder, module, average, {"adamw": optimizer}), 0
    for step in state.steps(6, save_every=2):
        if done == stop:
            break
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (module(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        state.update_average(0.9)
        done += 1
    return module.weight.detach().clone(), average.weight.detach().clone(), done


def test_training_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    through = _train(tmp_path / "through", stop=-1)
    _train(tmp_path / "broken", stop=5)  # saved after step 4; step 5 is lost and done again
    resumed = _train(tmp_path / "broken", stop=-1)
    assert resumed[2] == 2
    assert torch.equal(through[0], resumed[0])
    assert torch.equal(through[1], resumed[1])
    assert {file.name for file in (tmp_path / "broken").iterdir()} == {"state.safetensors", "state.json"}


def test_the_encoder_class_computes_the_principal_components() -> None:
    pixels = np.stack([encoder_image(0, i) for i in range(40)])
    vae = build_vae(pixels, seed=0)
    features = pixels[:4].astype(np.float64) / 127.5 - 1
    for matrix in projections(pixels, (8, 16, 16), seed=0):
        features = blocks(features) @ matrix.T
    latents = encode(vae, pixels[:4])
    assert np.abs(latents.numpy() - features.transpose(0, 3, 1, 2)).max() < 0.05
    with torch.no_grad():
        assert torch.allclose(vae.encode(to_tensor(pixels[:4])).latent_dist.mode()[:, :, 0], latents, atol=1e-4)


def test_components_are_the_directions_of_most_variance() -> None:
    rng = np.random.default_rng(0)
    rows, deviation = components(rng.standard_normal((2000, 3)) * [0.1, 3.0, 1.0], 2)
    assert np.abs(rows) == pytest.approx(np.array([[0, 1, 0], [0, 0, 1]]), abs=0.05)
    assert deviation == pytest.approx([3, 1], rel=0.1)


def test_the_dit_starts_as_zero_and_learns() -> None:
    dit = build_dit(DitConfig(layers=1, heads=1), hidden_size=8)
    latents, embeds = torch.randn(2, 16, 8, 8), torch.randn(2, 5, 8)
    assert velocity(dit, latents, torch.tensor([0.2, 0.9]), embeds).abs().max() == 0
    loss = flow_loss(dit, latents, embeds, 3.0, torch.Generator().manual_seed(0))
    loss.backward()
    assert dit.proj_out.bias.grad.abs().max() > 0


def test_batches_are_a_function_of_the_step_and_have_one_length() -> None:
    embeds = [torch.full((length, 4), float(i)) for i, length in enumerate([3, 5, 5, 7])]
    data = Latents(torch.arange(6.0).view(6, 1, 1, 1), torch.tensor([[1, 3], [2, 3]] * 3), ["", "a", "b", "c"], embeds)
    batches = Batches(data, DitConfig(batch=8, drop_caption=0.5))
    for step in range(10):
        (latents, text), (again, text_again) = batches(step), batches(step)
        assert latents.shape == (8, 1, 1, 1)
        assert text.shape[1] in (3, 5, 7)
        assert torch.equal(latents, again)
        assert torch.equal(text, text_again)
    assert len({batches(step)[1].shape[1] for step in range(10)}) > 1


def test_the_rate_rises_stays_and_falls() -> None:
    config = DitConfig(steps=1000, cool=500, warmup=100, learning_rate=1.0)
    rates = [rate(step, config) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[100] == rates[499] == 1.0
    assert rates[-1] < 0.02
    assert rates[500:] == sorted(rates[500:], reverse=True)


def test_generic_images_are_a_function_of_seed_and_index() -> None:
    for draw in (encoder_image, decoder_image):
        assert all(np.array_equal(draw(1, i), draw(1, i)) for i in range(8))
        assert draw_image(0, 0).pixels.shape == draw(0, 0).shape
