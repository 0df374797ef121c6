"""What each stage of a task runs, reads and loads, derived from the pipeline's declarations alone, without weights."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ray_diffsynth.config.dataset import DataConfig, DatasetConfig
from ray_diffsynth.data.buckets import SizeRule
from ray_diffsynth.data.spec import SampleSpec, file_list
from ray_diffsynth.errors import did_you_mean
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.graph import UnitGroup, cached_parameters, group_units, model_root, split_units
from ray_diffsynth.pipelines.core.sides import sided_parameters
from ray_diffsynth.pipelines.core.unit import PipelineUnit
from ray_diffsynth.storage import absolute


class LossContract(Protocol):
    """The part of a task that the split needs: what its loss reads, and what it surely writes itself."""

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def provides(self) -> tuple[str, ...]: ...


class TaskContract(LossContract, Protocol):
    """What the configuration is checked against: `Task` has it."""

    @property
    def columns(self) -> Mapping[str, Callable[[Any], Any]]: ...

    @property
    def as_sampled(self) -> bool: ...


# Settings with a flag of their own, or that only sampling reads.
_NOT_SET_HERE = frozenset(
    ("seed", "rand_device", "cfg_scale", "denoising_strength")
    + ("use_gradient_checkpointing", "use_gradient_checkpointing_offload")
)


@dataclass(frozen=True)
class Stages:
    """The split of a pipeline for one task.

    `parameters` is what the cache holds of a sample; `groups` are the stage-1 units by the models that they share.
    """

    stage1: tuple[PipelineUnit, ...]
    stage2: tuple[PipelineUnit, ...]
    parameters: tuple[str, ...]
    groups: tuple[UnitGroup, ...]
    trainable: tuple[str, ...]
    sided: tuple[str, ...] = ()
    """Those of `parameters` that the cache keeps with their sides."""

    def stage1_models(self) -> tuple[str, ...]:
        """Models that stage 1 loads: those of the groups that lead to a cached parameter."""
        return tuple(dict.fromkeys(model for group in self.groups for model in group.models))

    def stage2_models(self, pipe: BasePipeline) -> tuple[str, ...]:
        """Models that stage 2 loads: those of `model_fn` and of the units that need gradients."""
        by_units = [name for unit in self.stage2 for name in unit.onload_model_names or ()]
        return tuple(dict.fromkeys([*pipe.in_iteration_models, *(model_root(name) for name in by_units)]))


def plan_stages(pipe: BasePipeline, task: LossContract, trainable: Sequence[str], inputs: Collection[str]) -> Stages:
    """Split `pipe.units` for `task`; `inputs` are the parameters that a dataset row gives.

    A setting (`pipe.training_settings()`) is known to both stages and never cached, unless a stage-1 unit rewrites it
    or the dataset gives it.
    """
    for name in trainable:
        if pipe.parts and not hasattr(pipe, model_root(name)):
            raise PipelineError(f"there is no model {name!r} to train; {did_you_mean(name, pipe.parts)}")
    stage1, stage2 = split_units(pipe.units, trainable)
    written = {name for unit in stage1 for name in unit.fetch_output_params()}
    settings = [name for name in pipe.training_settings() if name not in written and name not in inputs]
    parameters = cached_parameters(
        stage1,
        stage2,
        reads=(*pipe.model_fn_params(), *task.reads),
        provided=(*task.provides, *pipe.collate_outputs, *settings),
        inputs=inputs,
    )
    sided = sided_parameters(pipe.units, stage1, stage2, parameters)
    groups = tuple(
        replace(group, sided=tuple(name for name in group.parameters if name in sided))
        for group in group_units(stage1, parameters)
    )
    return Stages(tuple(stage1), tuple(stage2), tuple(parameters), groups, tuple(trainable), sided)


def settings_of(pipe: BasePipeline, task: TaskContract, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The constants that both stages give to units and `model_fn`: the family's, with `given` (`--pipeline_settings`).

    A task that samples as the family does gets the family's settings of sampling. Raises PipelineError for a setting
    that the family does not have, or a value of another type.
    """
    settings = {**pipe.training_settings(), **(pipe.sampling_settings() if task.as_sampled else {})}
    read = _reads(pipe, task)
    free = [name for name in settings if name not in _NOT_SET_HERE and (read is None or name in read)]
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


def _reads(pipe: BasePipeline, task: TaskContract) -> set[str] | None:
    """Names that units, `model_fn` or the task read; None if a unit does not declare what it reads."""
    if any(unit.opaque for unit in pipe.units):
        return None
    by_units = (name for unit in pipe.units for name in unit.fetch_input_params())
    return {*pipe.column_params, *task.columns, *task.reads, *pipe.model_fn_params(), *by_units}


def check_columns(pipe: BasePipeline, task: TaskContract, config: DatasetConfig) -> None:
    """Raise PipelineError for a column of the configuration that would reach nobody.

    A unit that does not declare what it reads may read any.
    """
    read = _reads(pipe, task)
    if read is None:
        return
    written = {*(name for unit in pipe.units for name in unit.fetch_output_params()), *task.provides}
    if unread := [name for name in config.extra_columns if name not in read]:
        what = ", ".join(sorted(read - written - set(pipe.collate_outputs) - _NOT_SET_HERE))
        raise PipelineError(
            f"--extra_inputs {', '.join(unread)}: nothing of the family {pipe.family} reads it, so it would change "
            f"nothing; units, model_fn and the task read {what}. Leave it out, or name a pipeline that reads it by "
            "--family"
        )
    known = {*pipe.column_params, *pipe.column_params.values(), *config.extra_columns, *task.columns}
    if unused := [name for name in config.file_columns if name not in known and name not in ("image", "video")]:
        raise PipelineError(
            f"--data_file_keys {', '.join(unused)}: the column is given to nobody; name it in --extra_inputs too, or "
            "leave it out"
        )


def check_caption_dropout(stages: Stages, inputs: Collection[str]) -> None:
    """Raise PipelineError if no one empty caption can stand for those of all samples."""
    for group in stages.groups:
        own = [name for name in group.inputs if name in inputs]
        if "prompt" in own and len(own) > 1:
            others = ", ".join(name for name in own if name != "prompt")
            raise PipelineError(
                f"--caption_dropout does not work here: {', '.join(group.parameters)} of a sample is made from its "
                f"caption and {others} together, so that no empty caption can stand for all of them; leave it out"
            )


def dataset_spec(
    pipe: BasePipeline,
    config: DataConfig,
    task_columns: Mapping[str, Callable[[Any], Any]],
    *,
    keep_size: bool = False,
) -> SampleSpec:
    """How the columns of the configured dataset become inputs of `pipe`.

    Extra inputs and what the task asks for (`Task.columns`) are columns of their own name. `keep_size`: see
    `SampleSpec`.
    """
    own = pipe.column_params
    columns = {**own, **{name: name for name in (*config.extra_columns, *task_columns) if name not in own}}
    files = tuple(p for p, column in columns.items() if p in pipe.file_params or column in config.file_columns)
    return SampleSpec(
        base_path=absolute(config.dataset_base_path),
        columns=columns,
        file_params=files,
        video_params=pipe.video_params,
        image_params=tuple(param for param in own if param not in pipe.video_params),
        parsers={**{column: file_list for param, column in columns.items() if param in files}, **task_columns},
        keep_size=keep_size,
        target_sized=tuple(param for param in files if param not in pipe.reference_params),
        max_upscale=config.max_upscale,
        max_crop=config.max_crop,
        max_decode_bytes=int(config.max_decode_memory * 2**30),
        size=SizeRule(
            height=config.height,
            width=config.width,
            max_pixels=config.max_pixels,
            resolutions=config.resolutions,
            division=pipe.height_division_factor,
            num_frames=config.num_frames or pipe.default_num_frames,
            fps=config.fps,
            time_division=pipe.time_division_factor,
            time_remainder=pipe.time_division_remainder or 0,
        ),
    )
