"""What each stage of a task runs, reads and loads, derived from the pipeline's declarations alone, without weights."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray_diffsynth.config import CommonConfig
from ray_diffsynth.data.buckets import SizeRule
from ray_diffsynth.data.samples import SampleSpec
from ray_diffsynth.data.storage import absolute
from ray_diffsynth.pipelines.base import BasePipeline
from ray_diffsynth.pipelines.graph import UnitGroup, cached_parameters, group_units, split_units
from ray_diffsynth.pipelines.unit import PipelineUnit


class LossContract(Protocol):
    """The part of a task that the split needs: what its loss reads, and what it surely writes itself."""

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def provides(self) -> tuple[str, ...]: ...


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

    def stage1_models(self) -> tuple[str, ...]:
        """Models that stage 1 loads: those of the groups that lead to a cached parameter."""
        return tuple(dict.fromkeys(model for group in self.groups for model in group.models))

    def stage2_models(self, pipe: BasePipeline) -> tuple[str, ...]:
        """Models that stage 2 loads: those of `model_fn` and of the units that need gradients (law 5)."""
        by_units = [name for unit in self.stage2 for name in unit.onload_model_names or ()]
        return tuple(dict.fromkeys([*pipe.in_iteration_models, *(name.split(".")[0] for name in by_units)]))


def plan_stages(pipe: BasePipeline, task: LossContract, trainable: Sequence[str], inputs: Collection[str]) -> Stages:
    """Split `pipe.units` for `task`; `inputs` are the parameters that a dataset row gives.

    A setting (`pipe.training_settings()`) is known to both stages and never cached, unless a stage-1 unit rewrites it
    or the dataset gives it.
    """
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
    groups = group_units(stage1, parameters)
    return Stages(tuple(stage1), tuple(stage2), tuple(parameters), tuple(groups), tuple(trainable))


def dataset_spec(
    pipe: BasePipeline, config: CommonConfig, task_columns: Mapping[str, Callable[[Any], Any]]
) -> SampleSpec:
    """How the columns of the configured dataset become inputs of `pipe`.

    Extra inputs and what the task asks for (`Task.columns`) are columns of their own name.
    """
    own = pipe.column_params
    columns = {**own, **{name: name for name in (*config.extra_columns, *task_columns) if name not in own}}
    return SampleSpec(
        base_path=absolute(config.dataset_base_path),
        columns=columns,
        file_params=tuple(p for p, column in columns.items() if p in pipe.file_params or column in config.file_columns),
        video_params=pipe.video_params,
        picture_params=tuple(param for param in own if param not in pipe.video_params),
        parsers=task_columns,
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
