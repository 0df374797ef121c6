"""Supervised fine-tuning with the flow-matching loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ray_diffsynth.diffusion.loss_weighting import LOSS_WEIGHTINGS
from ray_diffsynth.diffusion.randomness import SampleKey, sample_noise, sample_timestep_index
from ray_diffsynth.diffusion.timestep_sampling import TIMESTEP_SAMPLINGS, TimestepSampling, shifted
from ray_diffsynth.diffusion.transfer import to_device
from ray_diffsynth.tasks.base import LossOutput, TrainablePipeline


@dataclass(frozen=True)
class SFT:
    """Mean squared error of the predicted velocity: ``w(sigma) * |v(x_sigma, sigma) - (noise - x0)|^2``.

    Rectified flow (Liu et al. 2022, arXiv:2209.03003): ``x_sigma = (1 - sigma) * x0 + sigma * noise``. Sigma is drawn
    from the family's 1000 training timesteps between the two boundaries (fractions of the schedule, 0 = the noisiest
    end, as in DiffSynth-Studio), and noise from N(0, 1); both are functions of the sample's key alone.

    timestep_sampling: see ``TimestepSampling``; "shift" draws uniformly from the schedule by which the family samples
    an image of the sample's size, 1000 points of it, or from the unshifted one shifted by ``timestep_shift``.

    weighting: a name of ``LOSS_WEIGHTINGS``.
    """

    name: ClassVar[str] = "sft"
    reads: ClassVar[tuple[str, ...]] = ("input_latents",)
    provides: ClassVar[tuple[str, ...]] = ("latents", "noise", "timestep")
    columns: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    as_sampled: ClassVar[bool] = False

    weighting: str = "bell"
    min_timestep_boundary: float = 0.0
    max_timestep_boundary: float = 1.0
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    timestep_shift: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_timestep_boundary < self.max_timestep_boundary <= 1.0:
            raise ValueError(
                f"min_timestep_boundary={self.min_timestep_boundary} and max_timestep_boundary="
                f"{self.max_timestep_boundary} leave no timestep; use 0 <= min < max <= 1"
            )
        if self.weighting not in LOSS_WEIGHTINGS:
            raise ValueError(f"loss weighting {self.weighting!r} is unknown; use {', '.join(LOSS_WEIGHTINGS)}")
        if self.timestep_sampling not in TIMESTEP_SAMPLINGS:
            names = ", ".join(TIMESTEP_SAMPLINGS)
            raise ValueError(f"timestep sampling {self.timestep_sampling!r} is unknown; use {names}")

    def timesteps(
        self, pipe: TrainablePipeline, keys: Sequence[SampleKey], x0: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B,) fp32 on the CPU: each key's timestep, 1000 * sigma. x0: the clean latents, whose size may matter."""
        low, high = self.min_timestep_boundary, self.max_timestep_boundary
        schedule = self._schedule(pipe, x0)
        drawn = TimestepSampling(self.timestep_sampling, self.logit_mean, self.logit_std, self.mode_scale)
        count = len(schedule)
        return schedule[
            torch.tensor([sample_timestep_index(count, key, low, high, drawn.position(key)) for key in keys])
        ]

    def _schedule(self, pipe: TrainablePipeline, x0: torch.Tensor | None) -> torch.Tensor:
        """The 1000 timesteps that are drawn from, the noisiest first."""
        if self.timestep_sampling != "shift":
            return pipe.scheduler.timesteps
        if self.timestep_shift is None:
            if x0 is None:
                raise ValueError("the timesteps of shift depend on the size of the latents; give x0")
            return pipe.shifted_schedule(x0).timesteps
        return 1000 * shifted(torch.linspace(1, 1 / 1000, 1000), self.timestep_shift)

    def loss(self, pipe: TrainablePipeline, batch: Mapping[str, Any], keys: Sequence[SampleKey]) -> LossOutput:
        """batch: what ``pipe.collate`` made of B samples, ``input_latents`` (B, ...) among it; keys: B of them."""
        x0 = batch["input_latents"].float()
        if len(keys) != len(x0):
            raise ValueError(f"{len(keys)} keys for {len(x0)} samples: one key a sample")
        timestep = self.timesteps(pipe, keys, x0)
        # Drawn on the CPU, one sample at a time: the same numbers on any device, in any batch.
        noise = to_device(torch.cat([sample_noise((1, *x0.shape[1:]), key) for key in keys]), x0.device)
        at = to_device(timestep, x0.device)
        latents = pipe.scheduler.add_noise(x0, noise, at)
        target = pipe.scheduler.training_target(x0, noise, at)
        made = {"latents": latents.to(pipe.torch_dtype), "noise": noise, "timestep": at}
        prediction = pipe.predict({**batch, **made})
        per_sample = (prediction.float() - target).square().flatten(1).mean(1)
        weight = LOSS_WEIGHTINGS[self.weighting](pipe.scheduler, timestep)
        if weight is not None:
            per_sample = per_sample * to_device(weight, per_sample.device)
        return LossOutput(per_sample.mean(), per_sample.detach(), timestep / 1000)
