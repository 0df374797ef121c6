"""What a sample's loss weighs at the timestep at which it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler

LossWeighting = Callable[["FlowMatchScheduler", "Tensor"], "Tensor | None"]
"""(the family's scheduler, timesteps (B,) fp32 in [0, 1000]) -> weights (B,) fp32, or None where all weigh 1."""


def bell(scheduler: FlowMatchScheduler, timestep: Tensor) -> Tensor:
    """DiffSynth-Studio's bell curve, with mean 1 over the training timesteps."""
    return scheduler.training_weight(timestep)


def none(scheduler: FlowMatchScheduler, timestep: Tensor) -> None:
    """Every sample weighs 1: nothing is multiplied."""


LOSS_WEIGHTINGS: dict[str, LossWeighting] = {"bell": bell, "none": none}
"""By the name that ``--loss_weighting`` takes."""
