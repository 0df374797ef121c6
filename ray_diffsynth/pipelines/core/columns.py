"""Which columns of a dataset a pipeline and a task read, and how they become inputs of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ray_diffsynth.config.dataset import DataConfig, DatasetConfig
from ray_diffsynth.data.buckets import SizeRule
from ray_diffsynth.data.spec import SampleSpec, file_list
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.stages import LossContract
from ray_diffsynth.storage import absolute

NOT_SET_BY_PIPELINE_SETTINGS = frozenset(
    ("seed", "rand_device", "cfg_scale", "denoising_strength")
    + ("use_gradient_checkpointing", "use_gradient_checkpointing_offload")
)
"""Settings with a flag of their own, or that only sampling reads."""


class TaskContract(LossContract, Protocol):
    """What the configuration is checked against: `Task` has it."""

    @property
    def columns(self) -> Mapping[str, Callable[[Any], Any]]: ...

    @property
    def as_sampled(self) -> bool: ...


def names_read(pipe: BasePipeline, task: TaskContract) -> set[str] | None:
    """Names that units, `model_fn` or the task read; None if a unit does not declare what it reads."""
    if any(unit.opaque for unit in pipe.units):
        return None
    by_units = (name for unit in pipe.units for name in unit.fetch_input_params())
    return {*pipe.column_params, *task.columns, *task.reads, *pipe.model_fn_params(), *by_units}


def check_columns(pipe: BasePipeline, task: TaskContract, config: DatasetConfig) -> None:
    """Raise PipelineError for a column of the configuration that would reach nobody.

    A unit that does not declare what it reads may read any.
    """
    read = names_read(pipe, task)
    if read is None:
        return
    written = {*(name for unit in pipe.units for name in unit.fetch_output_params()), *task.provides}
    if unread := [name for name in config.extra_columns if name not in read]:
        what = ", ".join(sorted(read - written - set(pipe.collate_outputs) - NOT_SET_BY_PIPELINE_SETTINGS))
        raise PipelineError(
            f"--extra_inputs {', '.join(unread)}: nothing of the family {pipe.family} reads it, so it would change "
            f"nothing; units, model_fn and the task read {what}. Leave it out, or name a pipeline that reads it by "
            "--family"
        )
    known = {*pipe.column_params, *pipe.column_params.values(), *config.extra_columns, *task.columns}
    if unmapped := [name for name in config.column_map or {} if name not in known]:
        raise PipelineError(
            f"--column_map {', '.join(unmapped)}: no input of that name is read; its inputs are "
            f"{', '.join(sorted(map(str, known)))}. Write inputs before the colons, the dataset's columns behind them"
        )
    if unused := [name for name in config.file_columns if name not in known and name not in ("image", "video")]:
        raise PipelineError(
            f"--data_file_keys {', '.join(unused)}: the column is given to nobody; name it in --extra_inputs too, or "
            "leave it out"
        )


def _column_names(
    pipe: BasePipeline, config: DatasetConfig, columns: Mapping[str, str], files: Sequence[str]
) -> dict[str, str]:
    """Column, as the pipeline calls it -> its name in the dataset, as the options say. Raises PipelineError."""
    # `column_map` may call an input by its parameter too, as --extra_inputs do.
    found = {columns.get(name, name): given for name, given in (config.column_map or {}).items()}
    for flag, given, column in (
        ("image_column", config.image_column, columns[files[0]] if files else None),
        ("caption_column", config.caption_column, columns.get("prompt")),
    ):
        if given is None:
            continue
        if column is None:
            raise PipelineError(f"--{flag} {given}: the family {pipe.family} reads no such column; leave it out")
        if found.get(column, given) != given:
            raise PipelineError(f"--{flag} {given} and --column_map name two columns for {column}; leave one out")
        found[column] = given
    return found


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
        column_names=_column_names(pipe, config, columns, files),
        split=config.dataset_split,
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
