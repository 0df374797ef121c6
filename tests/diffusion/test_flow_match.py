from __future__ import annotations

import math

import pytest
import torch

from ray_diffsynth.diffusion.flow_match import SCHEDULES, FlowMatchScheduler, ScheduleError


def training_sigmas(template: str) -> torch.Tensor:
    """DiffSynth-Studio's training schedules, written out from their formulas in float64."""
    t = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    if template == "FLUX.1":
        t = torch.linspace(1, 0.003 / 1.002, 1000, dtype=torch.float64)
    if template in ("FLUX.1", "Z-Image", "Wan"):
        shift = {"FLUX.1": 3, "Z-Image": 3, "Wan": 5}[template]
        return shift * t / (1 + (shift - 1) * t)
    mu, terminal = {"Qwen-Image": (0.8, 0.02), "FLUX.2": (0.8, None)}[template]
    sigma = math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    return sigma if terminal is None else 1 - (1 - sigma) / ((1 - sigma[-1]) / (1 - terminal))


@pytest.mark.parametrize("template", sorted(SCHEDULES))
def test_training_schedules_are_diffsynths(template: str) -> None:
    scheduler = FlowMatchScheduler(template)
    scheduler.set_timesteps(training=True)
    assert scheduler.training and scheduler.sigmas.shape == (1000,) and scheduler.sigmas.dtype == torch.float32
    # fp32 stretching to the terminal loses a few ulps.
    torch.testing.assert_close(scheduler.sigmas, training_sigmas(template).float(), rtol=0, atol=5e-7)
    assert torch.equal(scheduler.timesteps, scheduler.sigmas * 1000)


def test_bell_weights() -> None:
    scheduler = FlowMatchScheduler("Qwen-Image")
    scheduler.set_timesteps(1000, training=True)
    t = training_sigmas("Qwen-Image") * 1000
    y = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    expected = ((y - y.min()) * 1000 / (y - y.min()).sum()).float()
    torch.testing.assert_close(scheduler.loss_weights, expected, rtol=1e-4, atol=1e-5)
    assert float(scheduler.loss_weights.mean()) == pytest.approx(1, abs=1e-5)
    ids = torch.tensor([0, 17, 999])
    torch.testing.assert_close(scheduler.training_weight(scheduler.timesteps[ids]), scheduler.loss_weights[ids])
    assert scheduler.training_weight(500.0).shape == (1,)


def test_weights_are_for_training_only() -> None:
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ScheduleError, match="training=True"):
        scheduler.training_weight(500.0)


@pytest.mark.parametrize(("template", "steps"), [("Qwen-Image", 2), ("Qwen-Image", 30), ("Wan", 1), ("Wan", 4)])
def test_sampling_equals_diffusers(template: str, steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    config = {
        "Qwen-Image": {"use_dynamic_shifting": True, "shift_terminal": 0.02, "base_shift": 0.5, "max_shift": 0.9},
        "Wan": {"shift": 3.0, "_class_name": "FlowMatchEulerDiscreteScheduler"},
    }[template]
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    mu = calculate_shift(100, 256, 4096, 0.5, 0.9) if template == "Qwen-Image" else None
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy(), mu=mu)
    ours = FlowMatchScheduler(template, config=config)
    ours.set_timesteps(steps, image_seq_len=100)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-4)
    assert not ours.training and len(ours.loss_weights) == 0

    sample = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    mine = sample
    for t in ours.timesteps:
        mine = ours.step(torch.sin(mine), t, mine)
    for t in theirs.timesteps:
        sample = theirs.step(torch.sin(sample), t, sample).prev_sample
    torch.testing.assert_close(mine, sample, rtol=1e-5, atol=1e-6)


def test_denoising_strength_starts_later() -> None:
    scheduler = FlowMatchScheduler("Wan")
    scheduler.set_timesteps(2, denoising_strength=0.5)
    t = torch.tensor([0.5, 0.25])
    torch.testing.assert_close(scheduler.sigmas, 5 * t / (1 + 4 * t))
    with pytest.raises(ScheduleError, match="denoising_strength=0"):
        scheduler.set_timesteps(2, denoising_strength=0)


@pytest.mark.parametrize("timestep", [250.0, torch.tensor(250.0), torch.tensor([250.0]), torch.tensor([250.0, 250.0])])
def test_add_noise_takes_any_form_of_timestep(timestep: torch.Tensor | float) -> None:
    scheduler = FlowMatchScheduler()
    noisy = scheduler.add_noise(torch.ones(2, 3, 4), torch.full((2, 3, 4), 5.0), timestep)
    torch.testing.assert_close(noisy, torch.full((2, 3, 4), 2.0))


def test_add_noise_keeps_sigma_in_fp32_and_one_per_sample() -> None:
    scheduler = FlowMatchScheduler()
    x0, noise = torch.zeros(2, 1, 2), torch.ones(2, 1, 2)
    noisy = scheduler.add_noise(x0, noise, torch.tensor([123.456, 777.777]))
    torch.testing.assert_close(noisy[:, 0, 0], torch.tensor([0.123456, 0.777777]))
    assert scheduler.add_noise(x0.bfloat16(), noise.bfloat16(), 500.0).dtype == torch.bfloat16
    torch.testing.assert_close(scheduler.training_target(x0, noise, 1.0), noise)


def test_step_ends_at_zero_and_takes_batches() -> None:
    scheduler = FlowMatchScheduler("Z-Image")
    scheduler.set_timesteps(3)
    x0, noise = torch.randn(2, 4), torch.randn(2, 4)
    noisy = scheduler.add_noise(x0, noise, scheduler.timesteps[2])
    torch.testing.assert_close(scheduler.step(noise - x0, scheduler.timesteps[2], noisy), x0)
    first = scheduler.add_noise(x0, noise, scheduler.timesteps[:2])
    torch.testing.assert_close(scheduler.step(noise - x0, scheduler.timesteps[:2], first, to_final=True), x0)
    following = scheduler.step(noise - x0, scheduler.timesteps[:2].bfloat16(), first)
    torch.testing.assert_close(following, scheduler.add_noise(x0, noise, scheduler.timesteps[1:]))
    with pytest.raises(ScheduleError, match="not of the schedule"):
        scheduler.step(noise, 321.0, noisy)


def test_one_step_of_a_stretched_schedule_is_an_error_and_not_nan() -> None:
    with pytest.raises(ScheduleError, match="use num_inference_steps=2 or more"):
        FlowMatchScheduler("Qwen-Image").set_timesteps(1)


def test_unknown_template_lists_the_names() -> None:
    with pytest.raises(ScheduleError, match=r"'FLUX'; known: FLUX.1, FLUX.2, Qwen-Image, Wan, Z-Image"):
        FlowMatchScheduler("FLUX")
