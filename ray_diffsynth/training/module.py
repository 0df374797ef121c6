"""`DiffusionTrainingModule`: a pipeline and a task as one module whose forward is the loss of a microbatch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ray_diffsynth.data.warnings import about
from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.diffusion.transfer import as_stored, moved
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.runner import run_units
from ray_diffsynth.pipelines.core.settings import settings_of
from ray_diffsynth.pipelines.core.sides import row_of, state_of
from ray_diffsynth.pipelines.core.stages import Stages, plan_stages
from ray_diffsynth.pipelines.core.state import make_state
from ray_diffsynth.pipelines.core.unit import PipelineUnit
from ray_diffsynth.tasks import LossOutput, Task


class DiffusionTrainingModule(nn.Module):
    """The forward of training, split or not.

    Args:
        pipe: with the models of the stage loaded (`TrainPlan.models`).
        task: its loss; and what it reads, which decides what stage 1 is for.
        trained: names of the models with trainable parameters; a part of one is written `text_encoder.layers.3`.
        inputs: parameters that a dataset row gives (`SampleSpec.inputs`).
        split: samples are rows of a cache. Otherwise they are decoded inputs, and stage 1 runs here, without gradients,
            one sample at a time: what stage 2 gets is the same, bit for bit.
        pipeline_settings: see `settings_of`.
        stages, settings: the split with the units of `pipe`, and what `settings_of` gives, where they are planned
            already; else they are planned here.
    """

    def __init__(
        self,
        pipe: BasePipeline,
        task: Task,
        *,
        trained: Sequence[str],
        inputs: Collection[str],
        split: bool,
        pipeline_settings: Mapping[str, Any] | None = None,
        stages: Stages | None = None,
        settings: Mapping[str, Any] | None = None,
        use_gradient_checkpointing: bool = False,
        use_gradient_checkpointing_offload: bool = False,
    ) -> None:
        super().__init__()
        self.pipe = pipe
        self.task = task
        self.split = split
        self.stages = plan_stages(pipe, task, trained, inputs) if stages is None else stages
        self.settings = {
            **(settings_of(pipe, task, pipeline_settings) if settings is None else settings),
            "use_gradient_checkpointing": use_gradient_checkpointing,
            "use_gradient_checkpointing_offload": use_gradient_checkpointing_offload,
        }
        wanted = {unit for group in self.stages.groups for unit in group.units}
        self._stage1: list[PipelineUnit] = [unit for unit in self.stages.stage1 if unit in wanted]
        self._stage2: list[PipelineUnit] = list(self.stages.stage2)
        self._reads = (*pipe.model_fn_params(), *task.reads)

    def forward(self, samples: Sequence[Mapping[str, Any]], keys: Sequence[SampleKey]) -> LossOutput:
        """The loss of B samples with their keys; gradients flow to the trainable parameters."""
        batch = self.batch_of(samples, [key.sample_id for key in keys])
        return self.task.loss(self.pipe, batch, keys)

    def batch_of(self, samples: Sequence[Mapping[str, Any]], sample_ids: Sequence[str] = ()) -> dict[str, Any]:
        """What `model_fn` and the loss read of B samples: stage-2 units run, collated, on the pipeline's device.

        sample_ids: by which warnings name the samples.
        """
        rows = samples if self.split else self._encode_all(samples, sample_ids or [""] * len(samples))
        states = [
            state_of(self.pipe.units, {**self.settings, **moved(dict(row), self.pipe.device)}, self.stages.sided)
            for row in rows
        ]
        values = [state.flat() for state in run_units(self._stage2, self.pipe, states)]
        own = {name for row in rows for name in row} | {n for unit in self._stage2 for n in unit.fetch_output_params()}
        names = [name for name in dict.fromkeys(self._reads) if name in own and name in values[0]]
        columns = [name for name in names if name in self.task.columns]
        collated = self.pipe.collate([{n: value[n] for n in names if n not in columns} for value in values])
        return {**self.settings, **collated, **{name: [value[name] for value in values] for name in columns}}

    def _encode_all(self, samples: Sequence[Mapping[str, Any]], sample_ids: Sequence[str]) -> list[dict[str, Any]]:
        rows = []
        for sample, sample_id in zip(samples, sample_ids, strict=True):
            with about(sample_id):
                rows.append(self.encode(sample))
        return rows

    @torch.no_grad()
    def encode(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Stage 1 of one sample: exactly the parameters that a cache row would hold.

        Outside the loop's autocast, as stage 1 knows none: its rules on a GPU would change what encoders return.
        """
        state = make_state(self.pipe.units, {**self.settings, **sample})
        with torch.autocast(self.pipe.device.type, enabled=False):
            (state,) = run_units(self._stage1, self.pipe, [state])
        row: dict[str, Any] = as_stored(row_of(state, self.stages.parameters, self.stages.sided))
        return row

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def fix_unused(module: DiffusionTrainingModule, loss: torch.Tensor) -> list[str]:
    """Freeze the trainable parameters that `loss` does not reach; returns their names.

    DDP and the optimizer then wait for no gradient that never comes (DiffSynth-Studio's --find_unused_parameters).
    """
    loss.backward()  # type: ignore[no-untyped-call]
    unused = [name for name, parameter in module.trainable().items() if parameter.grad is None]
    freeze(module, unused)
    module.zero_grad(set_to_none=True)
    return unused


def freeze(module: nn.Module, names: Collection[str]) -> None:
    """Make the named parameters untrained."""
    found = dict(_parameters(module, names))
    for parameter in found.values():
        parameter.requires_grad_(False)


def _parameters(module: nn.Module, names: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    wanted = set(names)
    return ((name, parameter) for name, parameter in module.named_parameters() if name in wanted)
