"""The configuration of jobs/preprocess.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ray_diffsynth.config.cluster import ElasticConfig, PoolConfig
from ray_diffsynth.config.common import JobConfig, JobName
from ray_diffsynth.config.dataset import BatchConfig, DataConfig
from ray_diffsynth.config.model import TrainedModelsConfig
from ray_diffsynth.config.options import Component, option
from ray_diffsynth.config.task import TaskConfig
from ray_diffsynth.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Component):
    """The cache that is written, and what may be missing in it."""

    section = "cache"
    title = "Data"

    cache_codec: Literal["planes-zstd", "zstd", "none"] = "planes-zstd"
    """Compression of the cache; planes-zstd stores the two byte planes of bf16 apart, the smallest."""
    max_quarantine: float | None = option(None, least=0)
    """Fail when more samples than this are in quarantine: a count, or a fraction of all samples below 1."""
    retry_quarantined: bool = False
    """Try again what could not be encoded before."""
    replace_dataset: bool = False
    """Let the cache of another dataset in output_path become this one's; what both share is not encoded again."""
    dry_run: bool = option(False, group="What to do")
    """Only print what would be done: samples per bucket, bytes, what is reused and why not."""

    def check(self) -> None:
        """Raise ConfigError for a limit that is neither a count nor a fraction."""
        most = self.max_quarantine
        if most is not None and not (0 <= most < 1 or most == int(most)):
            raise ConfigError(f"max_quarantine={most}: give a whole number, or a fraction below 1")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(
    PoolConfig, CacheConfig, TrainedModelsConfig, BatchConfig, DataConfig, TaskConfig, ElasticConfig, JobConfig
):
    """Stage 1: encode a folder of images into a cache, on a pool of Ray actors."""

    job: ClassVar[JobName] = "preprocess"
    needed: ClassVar[str] = "--dataset_base_path PATH"

    task: str = option("sft:data_process")
    """What to do: sft:data_process, or direct_distill:data_process for the images of a teacher."""
