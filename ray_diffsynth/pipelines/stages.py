"""What each stage of a task runs, reads and loads, derived from the pipeline's declarations alone (no weights needed)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

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

    A setting (`pipe.training_settings()`) is known to both stages and never cached, unless a stage-1 unit rewrites it.
    """
    stage1, stage2 = split_units(pipe.units, trainable)
    written = {name for unit in stage1 for name in unit.fetch_output_params()}
    settings = [name for name in pipe.training_settings() if name not in written]
    parameters = cached_parameters(
        stage1,
        stage2,
        reads=(*pipe.model_fn_params(), *task.reads),
        provided=(*task.provides, *pipe.collate_outputs, *settings),
        inputs=inputs,
    )
    groups = group_units(stage1, parameters)
    return Stages(tuple(stage1), tuple(stage2), tuple(parameters), tuple(groups), tuple(trainable))


def dataset_spec(pipe: BasePipeline, config: CommonConfig) -> SampleSpec:
    """How the columns of the configured dataset become inputs of `pipe`; extra inputs are columns of their own name."""
    columns = {**pipe.column_params, **{name: name for name in config.extra_columns}}
    return SampleSpec(
        base_path=absolute(config.dataset_base_path),
        columns=columns,
        file_params=tuple(param for param, column in columns.items() if column in config.file_columns),
        size=SizeRule(
            height=config.height, width=config.width, max_pixels=config.max_pixels, division=pipe.height_division_factor
        ),
    )
