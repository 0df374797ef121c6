"""The settings of a pipeline that `--pipeline_settings` may replace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_diffsynth.errors import did_you_mean
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.columns import NOT_SET_BY_PIPELINE_SETTINGS, TaskContract, names_read
from ray_diffsynth.pipelines.core.errors import PipelineError


def settings_of(pipe: BasePipeline, task: TaskContract, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The constants that both stages give to units and `model_fn`: the family's, with `given` (`--pipeline_settings`).

    A task that samples as the family does gets the family's settings of sampling. Raises PipelineError for a setting
    that the family does not have, or a value of another type.
    """
    settings = {**pipe.training_settings(), **(pipe.sampling_settings() if task.as_sampled else {})}
    read = names_read(pipe, task)
    free = [name for name in settings if name not in NOT_SET_BY_PIPELINE_SETTINGS and (read is None or name in read)]
    for name, value in (given or {}).items():
        if name not in free:
            raise PipelineError(
                f"--pipeline_settings: {name!r} is no setting of the family {pipe.family}; {did_you_mean(name, free)}"
            )
        settings[name] = checked_setting(name, value, settings[name])
    return settings


def checked_setting(name: str, value: Any, default: Any) -> Any:
    """A value of `--pipeline_settings` in the type of its default. Raises PipelineError."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(default), "a text")
        raise PipelineError(f"--pipeline_settings: {name} is {value!r}; give {kind}, as its default {default!r}")
    return value
