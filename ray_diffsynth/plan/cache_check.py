"""Whether a cache is for the training that is to read it: told before a weight is downloaded or read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.errors import UserError
from ray_diffsynth.models.fingerprint import SKETCH, part_sketch
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.tasks import task_family


class SourceError(UserError):
    """The data does not fit what is to be trained, or there is none."""


def check_manifest(
    manifest: Manifest,
    where: str,
    *,
    family: str,
    task: str,
    trainable: Sequence[str],
    parameters: Collection[str],
) -> None:
    """Raise SourceError, naming both sides and the remedy, if the cache is for something else than this training."""
    again = "run stage 1 again with the same options as this training, or train what the cache is for"
    compared = {
        "family": (manifest.family, family),
        "task": (task_family(manifest.task), task_family(task)),
        "trained models": (", ".join(sorted(manifest.trainable)), ", ".join(sorted(trainable))),
    }
    for name, (there, here) in compared.items():
        if there != here:
            raise SourceError(f"the cache {where} is for {name} {there!r}, this training for {here!r}; {again}")
    if absent := [name for name in parameters if name not in manifest.parameters]:
        raise SourceError(
            f"the cache {where} lacks {', '.join(absent)}, which this training reads (it holds "
            f"{', '.join(manifest.parameters)}); {again}"
        )


def check_encoders(manifest: Manifest, where: str, source: ModelSource, parts: Mapping[str, Part]) -> None:
    """Raise SourceError if the model folder has an encoder other than the one that the cache was made with.

    An encoder that is not there is not asked for: stage 2 does without it.
    """
    for group in manifest.groups:
        for name, cached in group.parts.items():
            model = name.removeprefix(SKETCH)
            if not name.startswith(SKETCH) or model not in parts:
                continue
            here = part_sketch(source, parts[model].subfolder)
            if here is not None and here != cached:
                raise SourceError(
                    f"the {model} of {source.folder(parts[model].subfolder)} is not the one that the cache {where} "
                    f"was made with ({here[:8]} here, {cached[:8]} there); run stage 1 again with this model, or train "
                    "with the model of the cache"
                )


def check_settings(manifest: Manifest, where: str, settings: Mapping[str, Any]) -> None:
    """Raise SourceError if the cache was made with another value of one of these settings."""
    for group in manifest.groups:
        for name, value in settings.items():
            here, cached = json.dumps(value), group.parts.get(f"setting:{name}")
            if cached is not None and cached != here:
                raise SourceError(
                    f"the cache {where} was made with {name} = {cached}, this training has {here}; give both the same "
                    "--pipeline_settings, or run stage 1 again"
                )
