"""Where in a schedule a sample is trained: a position in [0, 1), 0 being pure noise, as a function of its key alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from torch import Tensor

from ray_diffsynth.diffusion.randomness import SampleKey, uniform

Sampling = Literal["uniform", "logit_normal", "mode", "shift"]
SAMPLINGS: tuple[Sampling, ...] = ("uniform", "logit_normal", "mode", "shift")
_SMALLEST = 2.0**-54
"""Instead of a draw of exactly 0, whose normal deviate is infinite."""


@dataclass(frozen=True)
class TimestepSampling:
    """How positions are drawn.

    uniform, shift: u. logit_normal: sigmoid(logit_mean + logit_std * z).
    mode: 1 - u - mode_scale * (cos(pi * u / 2)^2 - 1 + u).

    The densities are those of SD3 (Esser et al. 2024, arXiv:2403.03206, section 3.1) and of diffusers'
    `compute_density_for_timestep_sampling`. What differs for `shift` is the schedule that the position indexes.
    """

    sampling: Sampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def position(self, key: SampleKey) -> float:
        """A number in [0, 1)."""
        u = uniform("timestep", key)
        if self.sampling == "logit_normal":
            z = NormalDist().inv_cdf(max(u, _SMALLEST))
            u = 1 / (1 + math.exp(-(self.logit_mean + self.logit_std * z)))
        elif self.sampling == "mode":
            u = 1 - u - self.mode_scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
        return min(max(u, 0.0), math.nextafter(1.0, 0.0))


def shifted(sigma: Tensor, factor: float) -> Tensor:
    """factor * sigma / (1 + (factor - 1) * sigma): the time shift of SD3 (section 5.3.2) and its successors."""
    return factor * sigma / (1 + (factor - 1) * sigma)
