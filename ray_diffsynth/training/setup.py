"""From a configuration to the things that a run is made of. Every mismatch is an error here, before step 0."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from ray_diffsynth.cache.local_copy import LocalCopies
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.config.options import defaults_of, identity_of
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.data.warnings import collecting
from ray_diffsynth.errors import UserError
from ray_diffsynth.models.fingerprint import part_sketch
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.models.lora_file import lora_digest
from ray_diffsynth.pipelines.registry import get_pipeline_class
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.storage import absolute
from ray_diffsynth.tasks import Task, task_family
from ray_diffsynth.training.checkpoint import Checkpoint
from ray_diffsynth.training.data.source import (
    CacheSource,
    DatasetSource,
    SampleSource,
    read_rows,
)
from ray_diffsynth.training.identity import check_identity
from ray_diffsynth.training.report.memory import Footprint


class TrainingError(UserError):
    """A training run that cannot start or go on."""


@dataclass(frozen=True)
class Setup:
    """What follows from the configuration without loading any weights.

    models: names of the models that this run loads. sample: how the columns of a dataset become inputs.
    """

    config: TrainConfig
    output_path: str
    family: str
    source: ModelSource
    task: Task
    sample: SampleSpec
    models: tuple[str, ...]

    @classmethod
    def of(cls, config: TrainConfig) -> Setup:
        """Raises UserErrors for a model that is not found, a cache of something else, an impossible dtype, …"""
        plan = RunPlan.resolve(config)
        return cls(config, plan.output_path, plan.family, plan.source, plan.task, plan.sample, plan.models)

    def open_data(self) -> SampleSource:
        """The samples: the cache, or for the unsplit task the dataset, whose every picture is looked at."""
        if self.config.reads_cache:
            copies = None
            if self.config.shard_cache:
                copies = LocalCopies(self.config.shard_cache, int((self.config.shard_cache_gb or 0) * 1e9))
            reader = CacheReader(absolute(self.config.dataset_base_path), copies=copies)
            return CacheSource(reader, getattr(torch, self.config.dtype))
        return DatasetSource(self.sample, self._metadata_path())

    def check_data(self) -> None:
        """Raise DatasetError for metadata that cannot be read; a cache is looked at by `of`."""
        if not self.config.reads_cache:
            with collecting():  # the workers say it
                read_rows(self.sample, self._metadata_path())

    def _metadata_path(self) -> str | None:
        given = self.config.dataset_metadata_path
        return absolute(given) if given else None

    def identity(self, data: SampleSource) -> dict[str, Any]:
        """What a checkpoint and the run that goes on from it must share, as JSON values."""
        return {**self._own_identity(), "data": data.identity}

    def check_chosen(self, checkpoint: Checkpoint, where: str) -> None:
        """Raise CheckpointError if the checkpoint that --resume names is of a run with other options: before what lies
        in the output folder is set aside for it. The workers compare the data as well.
        """
        check_identity(checkpoint.identity, self._own_identity(), where, self.identity_defaults())

    def _own_identity(self) -> dict[str, Any]:
        settings = identity_of(self.config)
        settings["task"] = task_family(self.config.task)
        if preset := self.config.preset_lora_path:  # what is in it counts, not where it lies
            settings["preset_lora_path"] = f"content {lora_digest(preset, 8)}"
        own: dict[str, Any] = {**settings, "family": self.family, "weights": self._weights()}
        return dict(json.loads(json.dumps(own)))

    def identity_defaults(self) -> dict[str, Any]:
        """What a checkpoint was made with whose version did not have an option yet."""
        return defaults_of(type(self.config))

    def footprint(self) -> Footprint:
        """About what the models take before anything is added: as much as their files, half of it for 8 bits."""
        parts = get_pipeline_class(self.family).parts
        files = {name: self.source.weight_files(parts[name].subfolder) for name in self.models if name in parts}
        sizes = {name: sum(file.stat().st_size for file in each) for name, each in files.items()}
        denoising = get_pipeline_class(self.family).in_iteration_models
        return Footprint(sum(sizes.values()), sum(sizes.get(name, 0) for name in denoising) // 2, 0, 0)

    def _weights(self) -> dict[str, str | None]:
        """Which base models these are, without reading them whole."""
        parts = get_pipeline_class(self.family).parts
        return {name: part_sketch(self.source, parts[name].subfolder) for name in sorted(self.models) if name in parts}
