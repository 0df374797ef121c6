"""What each stage of a task runs, reads and loads, derived from the pipeline's declarations alone, without weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ray_diffsynth.errors import did_you_mean
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.graph import UnitGroup, cached_parameters, group_units, model_root, split_units
from ray_diffsynth.pipelines.core.sides import sided_parameters
from ray_diffsynth.pipelines.core.unit import PipelineUnit


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
