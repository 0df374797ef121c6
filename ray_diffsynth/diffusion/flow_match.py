"""Flow matching: x_t = (1 - sigma) * x0 + sigma * noise, and the model predicts the velocity noise - x0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_diffsynth.errors import UserError

NUM_TRAIN_TIMESTEPS = 1000


class ScheduleError(UserError, ValueError):
    """An unknown schedule, or a timestep or size that the schedule does not cover."""


@dataclass(frozen=True)
class Schedule:
    """A family's noise schedule: settings of diffusers' FlowMatchEulerDiscreteScheduler, and where its sigmas start.

    Args:
        config: settings of the diffusers scheduler.
        mu: time shift while training (dynamic shifting only); DiffSynth-Studio's value for the family.
        last_sigma: the unshifted sigma of the last step; None: 1/steps.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    mu: float | None = None
    last_sigma: float | None = None


SCHEDULES: Mapping[str, Schedule] = {
    "FLUX.1": Schedule({"shift": 3.0}, last_sigma=0.003 / 1.002),
    "FLUX.2": Schedule({"use_dynamic_shifting": True}, mu=0.8),
    "Qwen-Image": Schedule(
        {
            "use_dynamic_shifting": True,
            "shift_terminal": 0.02,
            "base_image_seq_len": 256,
            "max_image_seq_len": 8192,
            "base_shift": 0.5,
            "max_shift": 0.9,
        },
        mu=0.8,
    ),
    "Wan": Schedule({"shift": 5.0}),
    "Z-Image": Schedule({"shift": 3.0}),
}


class FlowMatchScheduler:
    """A flow-matching schedule; the sigmas come from diffusers' FlowMatchEulerDiscreteScheduler.

    Args:
        template: a name of `SCHEDULES`: the family's training schedule, and the one for inference without `config`.
        config: a `scheduler_config.json` of diffusers, used for inference, so that sampling equals diffusers'.

    Attributes:
        sigmas: fp32 on the CPU, falling, one a step (without the final 0).
        timesteps: 1000 * sigmas.
        training: whether the schedule is the one for training; units switch on it.
        loss_weights: bell-shaped weight of each training timestep, mean 1; empty unless training.

    Raises:
        ScheduleError: the template is unknown; lists the names.
    """

    def __init__(self, template: str = "Qwen-Image", *, config: Mapping[str, Any] | None = None) -> None:
        if template not in SCHEDULES:
            raise ScheduleError(f"unknown schedule {template!r}; known: {', '.join(sorted(SCHEDULES))}")
        self.template = template
        self.config = None if config is None else dict(config)
        self.num_train_timesteps = NUM_TRAIN_TIMESTEPS
        self.training = False
        self.sigmas = torch.empty(0)
        self.timesteps = torch.empty(0)
        self.loss_weights = torch.empty(0)
        self._bell = (0.0, 0.0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        denoising_strength: float = 1.0,
        *,
        training: bool = False,
        mu: float | None = None,
        image_seq_len: int | None = None,
    ) -> None:
        """Compute the schedule.

        Args:
            num_inference_steps: number of steps; None: 1000 when training, else 100.
            denoising_strength: where the unshifted sigmas start, in (0, 1]; below 1 keeps part of `input_image`.
            training: the family's training schedule, with loss weights.
            mu: time shift of a schedule with dynamic shifting; else from `image_seq_len`, else the family's.
            image_seq_len: number of image tokens that the transformer sees.

        Raises:
            ScheduleError: denoising_strength is out of range, or the schedule has no form of one step.
        """
        steps = num_inference_steps or (NUM_TRAIN_TIMESTEPS if training else 100)
        if not 0.0 < denoising_strength <= 1.0:
            raise ScheduleError(f"denoising_strength={denoising_strength} must lie in (0, 1]")
        schedule = SCHEDULES[self.template]
        given = None if training else self.config
        config = schedule.config if given is None else given
        if not training:
            self.check_inference_steps(steps)
        last = schedule.last_sigma if given is None else None  # a model's own configuration: as diffusers samples it
        # As diffusers and DiffSynth-Studio: equal steps from the start towards 0, without 0 itself.
        first = denoising_strength if last is None else last + (1.0 - last) * denoising_strength
        unshifted = np.linspace(first, denoising_strength / steps if last is None else last, steps)
        if config.get("use_dynamic_shifting") and mu is None:
            mu = _dynamic_mu(config, image_seq_len) if image_seq_len is not None else schedule.mu
        self.sigmas = _diffusers_sigmas(config, unshifted, mu if config.get("use_dynamic_shifting") else None)
        self.timesteps = self.sigmas * NUM_TRAIN_TIMESTEPS
        self.training = training
        self.loss_weights = self._make_weights() if training else torch.empty(0)

    def check_inference_steps(self, steps: int) -> None:
        """Raise ScheduleError if sampling cannot be done in so few steps."""
        config = SCHEDULES[self.template].config if self.config is None else self.config
        if steps == 1 and config.get("shift_terminal"):  # stretching one sigma of 1 to the terminal is 0 / 0
            raise ScheduleError(
                f"the schedule {self.template} cannot be run in 1 step; use num_inference_steps=2 or more"
            )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """(1 - sigma) * x0 + sigma * noise with sigma = timestep / 1000, computed in fp32, in x0's dtype and shape.

        `timestep` is a scalar or has one entry a sample, (B,).
        """
        sigma = self._sigma(timestep, original_samples)
        noisy = (1.0 - sigma) * original_samples.float() + sigma * noise.float()
        return noisy.to(original_samples.dtype)

    def training_target(self, sample: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """The velocity noise - x0 (it does not depend on the timestep)."""
        return noise - sample

    def training_weight(self, timestep: Tensor | float) -> Tensor:
        """Loss weight of each timestep, fp32, shape (B,): DiffSynth-Studio's bell (its `set_training_weight`).

        y = exp(-2 * ((t - 500) / 1000)^2); weight = y - min(y), scaled to mean 1 over the training timesteps.

        Raises:
            ScheduleError: not in training mode.
        """
        if not self.training:
            raise ScheduleError("loss weights exist in training only; call set_timesteps(training=True) first")
        lowest, scale = self._bell
        return (_bell(torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)) - lowest) * scale

    def step(self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, to_final: bool = False) -> Tensor:
        """One Euler step from `timestep` to the next of the schedule, or to sigma 0 (the last one, or `to_final`).

        Computed in fp32, returned in `sample`'s dtype. `timestep` is a scalar or (B,).

        Raises:
            ScheduleError: a timestep is not of the schedule (up to bf16 rounding).
        """
        times = torch.as_tensor(timestep, dtype=torch.float32).cpu().reshape(-1)
        distances = (self.timesteps[None, :] - times[:, None]).abs()
        ids = distances.argmin(dim=1)
        if bool((distances.min(dim=1).values > times.abs() * 2**-8 + 1e-3).any()):
            raise ScheduleError(f"timestep {times.tolist()} is not of the schedule of {len(self.timesteps)} steps")
        following = torch.cat([self.sigmas[1:], torch.zeros(1)])
        delta = (torch.zeros(len(ids)) if to_final else following[ids]) - self.sigmas[ids]
        delta = delta.to(sample.device).reshape(-1, *[1] * (sample.ndim - 1))
        return (sample.float() + delta * model_output).to(sample.dtype)

    def _sigma(self, timestep: Tensor | float, like: Tensor) -> Tensor:
        sigma = torch.as_tensor(timestep, dtype=torch.float32, device=like.device) / NUM_TRAIN_TIMESTEPS
        return sigma.reshape(-1, *[1] * (like.ndim - 1))

    def _make_weights(self) -> Tensor:
        bell = _bell(self.timesteps)
        lowest = bell.min()
        scale = len(bell) / (bell - lowest).sum()
        self._bell = (float(lowest), float(scale))
        return (bell - lowest) * scale


def _bell(timestep: Tensor) -> Tensor:
    half = NUM_TRAIN_TIMESTEPS / 2
    return torch.exp(-2 * ((timestep - half) / NUM_TRAIN_TIMESTEPS) ** 2)


def _dynamic_mu(config: Mapping[str, Any], image_seq_len: int) -> float:
    """Linear in the number of image tokens; diffusers' calculate_shift and its defaults."""
    base_len, max_len = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, highest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (highest - base) / (max_len - base_len)
    return float(image_seq_len * slope + (base - slope * base_len))


def _diffusers_sigmas(config: Mapping[str, Any], unshifted: np.ndarray[Any, Any], mu: float | None) -> Tensor:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    scheduler.set_timesteps(sigmas=unshifted, mu=mu)
    sigmas: Tensor = scheduler.sigmas[: len(unshifted)]
    return sigmas.clone()
