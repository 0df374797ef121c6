"""Supervised fine-tuning with the flow-matching loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ray_diffsynth.diffusion.randomness import SampleKey, sample_noise, sample_timestep_index
from ray_diffsynth.tasks.base import LossOutput, TrainablePipeline


@dataclass(frozen=True)
class SFT:
    """Mean squared error of the predicted velocity: ``w(sigma) * |v(x_sigma, sigma) - (noise - x0)|^2``.

    Rectified flow (Liu et al. 2022, arXiv:2209.03003): ``x_sigma = (1 - sigma) * x0 + sigma * noise``. Sigma is drawn
    uniformly from the family's 1000 training timesteps between the two boundaries (fractions of the schedule, 0 = the
    noisiest end, as in DiffSynth-Studio), and noise from N(0, 1); both are functions of the sample's key alone.

    weighting: "bell" multiplies by DiffSynth-Studio's bell-shaped weight (mean 1), "none" by 1.
    """

    name: ClassVar[str] = "sft"
    reads: ClassVar[tuple[str, ...]] = ("input_latents",)
    provides: ClassVar[tuple[str, ...]] = ("latents", "noise", "timestep")

    weighting: Literal["bell", "none"] = "bell"
    min_timestep_boundary: float = 0.0
    max_timestep_boundary: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_timestep_boundary < self.max_timestep_boundary <= 1.0:
            raise ValueError(
                f"min_timestep_boundary={self.min_timestep_boundary} and max_timestep_boundary="
                f"{self.max_timestep_boundary} leave no timestep; use 0 <= min < max <= 1"
            )
        if self.weighting not in ("bell", "none"):
            raise ValueError(f"loss weighting {self.weighting!r} is unknown; use 'bell' or 'none'")

    def timesteps(self, pipe: TrainablePipeline, keys: Sequence[SampleKey]) -> torch.Tensor:
        """(B,) fp32 on the CPU: each key's timestep, 1000 * sigma."""
        schedule = pipe.scheduler.timesteps
        low, high = self.min_timestep_boundary, self.max_timestep_boundary
        return schedule[torch.tensor([sample_timestep_index(len(schedule), key, low, high) for key in keys])]

    def loss(self, pipe: TrainablePipeline, batch: Mapping[str, Any], keys: Sequence[SampleKey]) -> LossOutput:
        """batch: what ``pipe.collate`` made of B samples, ``input_latents`` (B, ...) among it; keys: B of them."""
        x0 = batch["input_latents"].float()
        if len(keys) != len(x0):
            raise ValueError(f"{len(keys)} keys for {len(x0)} samples: one key a sample")
        timestep = self.timesteps(pipe, keys)
        # Drawn on the CPU, one sample at a time: the same numbers on any device, in any batch.
        noise = torch.cat([sample_noise((1, *x0.shape[1:]), key) for key in keys]).to(x0.device)
        latents = pipe.scheduler.add_noise(x0, noise, timestep)
        target = pipe.scheduler.training_target(x0, noise, timestep)
        made = {"latents": latents.to(pipe.torch_dtype), "noise": noise, "timestep": timestep.to(x0.device)}
        prediction = pipe.predict({**batch, **made})
        per_sample = (prediction.float() - target).square().flatten(1).mean(1)
        if self.weighting == "bell":
            per_sample = per_sample * pipe.scheduler.training_weight(timestep).to(per_sample)
        return LossOutput(per_sample.mean(), per_sample.detach(), timestep / 1000)
