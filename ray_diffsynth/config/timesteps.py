"""Which timesteps are trained, what they weigh, and how often the caption is left out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ray_diffsynth.config.effects import BOUNDARIES, TIMESTEPS, needs
from ray_diffsynth.config.options import Component, option
from ray_diffsynth.errors import ConfigError

_LOGIT_NORMAL = needs("timestep_sampling", "logit_normal")


@dataclass(frozen=True, kw_only=True)
class TimestepConfig(Component):
    """The loss over the timesteps. The bounds are those beyond which a training computes nothing."""

    section = "timesteps"
    title = "Optimisation"

    loss_weighting: str = option(
        "bell", names="ray_diffsynth.diffusion.loss_weighting:LOSS_WEIGHTINGS", effects=(TIMESTEPS,)
    )
    """Weight of the loss over the timesteps: DiffSynth's bell curve, or none."""
    timestep_sampling: str = option(
        "uniform", names="ray_diffsynth.diffusion.timestep_sampling:TIMESTEP_SAMPLINGS", effects=(TIMESTEPS,)
    )
    """How timesteps are drawn: uniform over the family's schedule, SD3's logit_normal, mode, shift by resolution."""
    # A logit of hundreds overflows.
    logit_mean: float | None = option(None, least=-20.0, most=20.0, used_as=0.0, effects=(_LOGIT_NORMAL,))
    """Mean of logit_normal, -20 to 20; below 0 draws more of the noisy end; 0 when not given."""
    logit_std: float | None = option(None, least=0.0, most=20.0, used_as=1.0, effects=(_LOGIT_NORMAL,))
    """Standard deviation of logit_normal, up to 20; 1 when not given."""
    # Beyond it SD3's mode (arXiv:2403.03206, section 3.1) leaves the schedule.
    mode_scale: float | None = option(
        None, least=-1.0, most=2 / (math.pi - 2), used_as=1.29, effects=(needs("timestep_sampling", "mode"),)
    )
    """Scale of mode, -1 to 1.75; 1.29 when not given."""
    # A shift of 0 divides 0 by 0.
    timestep_shift: float | None = option(None, least=1e-3, most=1e3, effects=(needs("timestep_sampling", "shift"),))
    """Factor of shift, 0.001 to 1000; by the number of image tokens, as the family's sampling, when not given."""
    min_timestep_boundary: float = option(0.0, effects=(BOUNDARIES,))
    """Start of the part of the schedule that is trained, as a fraction; 0 is pure noise."""
    max_timestep_boundary: float = option(1.0, effects=(BOUNDARIES,))
    """End of the part of the schedule that is trained, as a fraction; 1 is the clean image."""
    caption_dropout: float = 0.0
    """Part of the samples that are trained with the empty caption, drawn anew in each epoch."""

    def check(self) -> None:
        """Raise ConfigError for a part of the schedule or of the samples that cannot be."""
        low, high = self.min_timestep_boundary, self.max_timestep_boundary
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"min_timestep_boundary={low} and max_timestep_boundary={high} enclose nothing; "
                "use fractions with 0 <= min < max <= 1"
            )
        if not 0 <= self.caption_dropout <= 1:
            raise ConfigError(f"caption_dropout={self.caption_dropout} is no part of the samples; use 0 to 1")
