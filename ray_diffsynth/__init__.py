"""Two-stage LoRA training of diffusion transformers on a Ray cluster: encode once, then train from the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_diffsynth.lazy import importer
from ray_diffsynth.version import __version__

if TYPE_CHECKING:
    from ray_diffsynth.cache.manifest import Manifest as Manifest
    from ray_diffsynth.cache.reader import CacheReader as CacheReader
    from ray_diffsynth.config import GenerateConfig as GenerateConfig
    from ray_diffsynth.config import PreprocessConfig as PreprocessConfig
    from ray_diffsynth.config import TrainConfig as TrainConfig
    from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler as FlowMatchScheduler
    from ray_diffsynth.diffusion.gradient_checkpoint import gradient_checkpoint_forward as gradient_checkpoint_forward
    from ray_diffsynth.errors import ConfigError as ConfigError
    from ray_diffsynth.errors import UserError as UserError
    from ray_diffsynth.generate.job import run as run_generate
    from ray_diffsynth.pipelines.core.base import BasePipeline as BasePipeline
    from ray_diffsynth.pipelines.core.check import check_units as check_units
    from ray_diffsynth.pipelines.core.graph import split_units as split_units
    from ray_diffsynth.pipelines.core.model_parts import Part as Part
    from ray_diffsynth.pipelines.core.unit import PipelineUnit as PipelineUnit
    from ray_diffsynth.preprocess.job import run as run_preprocess
    from ray_diffsynth.training.module import DiffusionTrainingModule as DiffusionTrainingModule
    from ray_diffsynth.training.ray.job import run as run_train

__all__ = [
    "__version__",
    "BasePipeline",
    "CacheReader",
    "ConfigError",
    "DiffusionTrainingModule",
    "FlowMatchScheduler",
    "GenerateConfig",
    "Manifest",
    "Part",
    "PipelineUnit",
    "PreprocessConfig",
    "TrainConfig",
    "UserError",
    "check_units",
    "gradient_checkpoint_forward",
    "run_generate",
    "run_preprocess",
    "run_train",
    "split_units",
]

# `import ray_diffsynth` loads neither torch nor ray.
__getattr__ = importer(
    __name__,
    {
        "BasePipeline": "pipelines.core.base",
        "CacheReader": "cache.reader",
        "ConfigError": "errors",
        "DiffusionTrainingModule": "training.module",
        "FlowMatchScheduler": "diffusion.flow_match",
        "GenerateConfig": "config",
        "Manifest": "cache.manifest",
        "Part": "pipelines.core.model_parts",
        "PipelineUnit": "pipelines.core.unit",
        "PreprocessConfig": "config",
        "TrainConfig": "config",
        "UserError": "errors",
        "check_units": "pipelines.core.check",
        "gradient_checkpoint_forward": "diffusion.gradient_checkpoint",
        "run_generate": "generate.job:run",
        "run_preprocess": "preprocess.job:run",
        "run_train": "training.ray.job:run",
        "split_units": "pipelines.core.graph",
    },
)
