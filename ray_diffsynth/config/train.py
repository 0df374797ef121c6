"""The configuration of jobs/train.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ray_diffsynth.config.cluster import ElasticConfig
from ray_diffsynth.config.common import JobConfig, JobName
from ray_diffsynth.config.dataset import BatchConfig, DataConfig
from ray_diffsynth.config.lora import LoraConfig
from ray_diffsynth.config.memory import LocalCacheConfig, MemoryConfig
from ray_diffsynth.config.optimizer import OptimizerConfig
from ray_diffsynth.config.options import option
from ray_diffsynth.config.schedule import ScheduleConfig
from ray_diffsynth.config.task import TaskConfig
from ray_diffsynth.config.timesteps import TimestepConfig
from ray_diffsynth.config.validation import CheckpointConfig, SampleImageConfig, TrackingConfig, ValidationConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    CheckpointConfig,
    TrackingConfig,
    SampleImageConfig,
    ValidationConfig,
    LocalCacheConfig,
    MemoryConfig,
    TimestepConfig,
    OptimizerConfig,
    ScheduleConfig,
    LoraConfig,
    BatchConfig,
    DataConfig,
    TaskConfig,
    ElasticConfig,
    JobConfig,
):
    """Stage 2: train a LoRA from the cache of preprocess (sft:train), or from images in one go (sft)."""

    job: ClassVar[JobName] = "train"
    needed: ClassVar[str] = "--dataset_base_path PATH"

    task: str = option("sft:train")
    """What to do: sft:train from a cache, sft from images without one, direct_distill:train or direct_distill."""
