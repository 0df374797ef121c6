"""Where in a schedule a sample is trained: a position in [0, 1), 0 being pure noise, as a function of its key alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from ray_diffsynth.diffusion.randomness import SampleKey, uniform

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST = 2.0**-54
"""Instead of a draw of exactly 0, whose normal deviate is infinite."""


@dataclass(frozen=True)
class TimestepSampling:
    """How positions are drawn: the function of `TIMESTEP_SAMPLINGS` by that name, and its settings.

    The densities are those of SD3 (Esser et al. 2024, arXiv:2403.03206, section 3.1) and of diffusers'
    `compute_density_for_timestep_sampling`. What differs for `shift` is the schedule that the position indexes.
    """

    sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def position(self, key: SampleKey) -> float:
        """A number in [0, 1)."""
        drawn = TIMESTEP_SAMPLINGS[self.sampling](uniform("timestep", key), self)
        return min(max(drawn, 0.0), math.nextafter(1.0, 0.0))


def uniform_position(u: float, settings: TimestepSampling) -> float:
    """u itself."""
    return u


def logit_normal_position(u: float, settings: TimestepSampling) -> float:
    """sigmoid(logit_mean + logit_std * z), z being the normal deviate of u."""
    z = NormalDist().inv_cdf(max(u, _SMALLEST))
    return 1 / (1 + math.exp(-(settings.logit_mean + settings.logit_std * z)))


def mode_position(u: float, settings: TimestepSampling) -> float:
    """1 - u - mode_scale * (cos(pi * u / 2)^2 - 1 + u)."""
    return 1 - u - settings.mode_scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)


TIMESTEP_SAMPLINGS: dict[str, Callable[[float, TimestepSampling], float]] = {
    "uniform": uniform_position,
    "logit_normal": logit_normal_position,
    "mode": mode_position,
    "shift": uniform_position,
}
"""By the name that ``--timestep_sampling`` takes: a draw u in [0, 1) -> a position."""


def shifted(sigma: Tensor, factor: float) -> Tensor:
    """factor * sigma / (1 + (factor - 1) * sigma): the time shift of SD3 (section 5.3.2) and its successors."""
    return factor * sigma / (1 + (factor - 1) * sigma)
