"""The configuration of each job, made of a small dataclass for each component that it configures."""

from __future__ import annotations

from ray_diffsynth.config.common import JobConfig, JobName
from ray_diffsynth.config.generate import GenerateConfig
from ray_diffsynth.config.preprocess import PreprocessConfig
from ray_diffsynth.config.train import TrainConfig

JOBS: tuple[type[JobConfig], ...] = (PreprocessConfig, TrainConfig, GenerateConfig)
"""The configurations of all jobs."""

__all__ = ["JOBS", "GenerateConfig", "JobConfig", "JobName", "PreprocessConfig", "TrainConfig"]
