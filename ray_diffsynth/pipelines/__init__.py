"""What a model family does, as units; the public names are here.

They are imported on first use, so that the registry stays free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_diffsynth.lazy import importer

if TYPE_CHECKING:
    from ray_diffsynth.pipelines.core.base import BasePipeline as BasePipeline
    from ray_diffsynth.pipelines.core.check import check_units as check_units
    from ray_diffsynth.pipelines.core.errors import MissingInputError as MissingInputError
    from ray_diffsynth.pipelines.core.errors import PipelineError as PipelineError
    from ray_diffsynth.pipelines.core.errors import UnitError as UnitError
    from ray_diffsynth.pipelines.core.graph import split_units as split_units
    from ray_diffsynth.pipelines.core.model_parts import Part as Part
    from ray_diffsynth.pipelines.core.runner import PipelineUnitRunner as PipelineUnitRunner
    from ray_diffsynth.pipelines.core.runner import run_units as run_units
    from ray_diffsynth.pipelines.core.stages import plan_stages as plan_stages
    from ray_diffsynth.pipelines.core.state import UnitState as UnitState
    from ray_diffsynth.pipelines.core.unit import PipelineUnit as PipelineUnit
    from ray_diffsynth.pipelines.registry import family_of as family_of
    from ray_diffsynth.pipelines.registry import get_pipeline_class as get_pipeline_class

__getattr__ = importer(
    __name__,
    {
        "BasePipeline": "core.base",
        "MissingInputError": "core.errors",
        "Part": "core.model_parts",
        "PipelineError": "core.errors",
        "PipelineUnit": "core.unit",
        "PipelineUnitRunner": "core.runner",
        "UnitError": "core.errors",
        "UnitState": "core.state",
        "check_units": "core.check",
        "family_of": "registry",
        "get_pipeline_class": "registry",
        "plan_stages": "core.stages",
        "run_units": "core.runner",
        "split_units": "core.graph",
    },
)
