"""The samples of a planned training."""

from __future__ import annotations

import torch

from ray_diffsynth.cache.local_copy import LocalCopies
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.data.dataset import read_dataset
from ray_diffsynth.data.metadata_files import metadata_path_from_root
from ray_diffsynth.data.warnings import collecting
from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.storage import absolute
from ray_diffsynth.training.data.source import CacheSource, DatasetSource, SampleSource


def open_data(plan: TrainPlan) -> SampleSource:
    """The samples: the cache, or for the unsplit task the dataset, whose every image is looked at."""
    config = plan.config
    if config.reads_cache:
        copies = None
        if config.shard_cache:
            copies = LocalCopies(config.shard_cache, int((config.shard_cache_gb or 0) * 1e9))
        reader = CacheReader(absolute(config.dataset_base_path), copies=copies)
        reader.check_files()  # of a copy that is not whole: told now, not when a step asks for what is missing
        return CacheSource(reader, getattr(torch, config.dtype))
    return DatasetSource(plan.sample, _metadata_path(plan))


def check_data(plan: TrainPlan) -> None:
    """Raise DatasetError for metadata that cannot be read; a cache was looked at when the run was planned."""
    if not plan.config.reads_cache:
        with collecting():  # the workers log them
            read_dataset(plan.sample, _metadata_path(plan))


def _metadata_path(plan: TrainPlan) -> str | None:
    given = plan.config.dataset_metadata_path
    return metadata_path_from_root(absolute(plan.config.dataset_base_path), given) if given else None
