"""The mathematics of training. Names are imported on first use, so that the plan can use `randomness` without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_diffsynth.lazy import importer

if TYPE_CHECKING:
    from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler as FlowMatchScheduler
    from ray_diffsynth.diffusion.gradient_checkpoint import gradient_checkpoint_forward as gradient_checkpoint_forward
    from ray_diffsynth.diffusion.randomness import SampleKey as SampleKey

__getattr__ = importer(
    __name__,
    {
        "FlowMatchScheduler": "flow_match",
        "SampleKey": "randomness",
        "gradient_checkpoint_forward": "gradient_checkpoint",
    },
)
