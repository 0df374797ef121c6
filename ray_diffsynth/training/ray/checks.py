"""What is found before Ray starts: paths, LoRA files, trackers, the optimizer."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.data.metadata_files import metadata_path_from_root
from ray_diffsynth.models.lora_file import check_lora_file
from ray_diffsynth.storage import absolute
from ray_diffsynth.training.optim import customized
from ray_diffsynth.training.report.trackers import check_trackers, fallback

logger = logging.getLogger(__name__)


def absolute_paths(config: TrainConfig) -> TrainConfig:
    """Ray's workers run in another folder: everything that is a path here is made one from the root."""
    names = ("dataset_base_path", "output_path", "preset_lora_path")
    changes: dict[str, Any] = {name: absolute(value) for name in names if (value := getattr(config, name))}
    for name in ("model", "tokenizer_path", "processor_path"):
        value = getattr(config, name)
        if value and Path(value).exists():  # else a hub id
            changes[name] = absolute(value)
    if config.dataset_metadata_path and not config.reads_cache:
        base = absolute(config.dataset_base_path)
        changes["dataset_metadata_path"] = metadata_path_from_root(base, config.dataset_metadata_path)
    if config.lora_checkpoint:
        changes["lora_checkpoint"] = ",".join(absolute(path) for path in config.lora_checkpoints.values())
    if config.resume not in ("auto", "never"):
        changes["resume"] = absolute(config.resume)
    return replace(config, **changes)


def check_files(config: TrainConfig, *, going_on: bool) -> None:
    """Raise the UserErrors of LoRA files, trackers and an optimizer that a worker would raise after Ray has started.

    A run that is `going_on` may have left the LoRA that it started from behind.
    """
    start = () if going_on else config.lora_checkpoints.values()
    for path in filter(None, (config.preset_lora_path, *start)):
        check_lora_file(path)
    check_trackers(config)
    if told := fallback(config):
        logger.info(told)
    if config.customized_optimizer:
        customized(config.customized_optimizer, config)
