"""The mathematics of training. Names are imported on first use, so that the plan can use `randomness` without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler as FlowMatchScheduler
    from ray_diffsynth.diffusion.gradient_checkpoint import gradient_checkpoint_forward as gradient_checkpoint_forward
    from ray_diffsynth.diffusion.randomness import SampleKey as SampleKey

_HOMES = {
    "FlowMatchScheduler": "flow_match",
    "SampleKey": "randomness",
    "gradient_checkpoint_forward": "gradient_checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
