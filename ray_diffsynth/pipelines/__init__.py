"""What a model family does, as units. Names are imported on first use, so that the registry stays free of torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_diffsynth.pipelines.base import BasePipeline as BasePipeline
    from ray_diffsynth.pipelines.base import Part as Part
    from ray_diffsynth.pipelines.check import check_units as check_units
    from ray_diffsynth.pipelines.graph import split_units as split_units
    from ray_diffsynth.pipelines.registry import family_of as family_of
    from ray_diffsynth.pipelines.registry import get_pipeline_class as get_pipeline_class
    from ray_diffsynth.pipelines.unit import PipelineUnit as PipelineUnit
    from ray_diffsynth.pipelines.unit import PipelineUnitRunner as PipelineUnitRunner

_HOMES = {
    "BasePipeline": "base",
    "Part": "base",
    "PipelineUnit": "unit",
    "PipelineUnitRunner": "unit",
    "check_units": "check",
    "family_of": "registry",
    "get_pipeline_class": "registry",
    "split_units": "graph",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
