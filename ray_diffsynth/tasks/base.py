"""The contract of a training task, and the names by which a run asks for one."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch

from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler
from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.errors import UserError

STAGES = ("data_process", "train")


class TaskError(UserError):
    """A task name that no task goes by."""


@dataclass(frozen=True)
class LossOutput:
    """The loss of one microbatch of B samples.

    loss: 0-d fp32, the mean of ``per_sample``; what is differentiated.
    per_sample: (B,) fp32, detached: each sample's weighted loss.
    sigma: (B,) fp32 in [0, 1]: the noise level at which each sample was seen.
    """

    loss: torch.Tensor
    per_sample: torch.Tensor
    sigma: torch.Tensor


class TrainablePipeline(Protocol):
    """What a task needs of a pipeline; ``pipelines.core.base.BasePipeline`` has it."""

    scheduler: FlowMatchScheduler
    torch_dtype: torch.dtype

    def predict(self, batch: Mapping[str, Any]) -> torch.Tensor: ...

    def initial_noise(self, shape: Sequence[int], seed: int, rand_device: str = "cpu") -> torch.Tensor: ...

    def sampling_schedule(self, latents: torch.Tensor, num_inference_steps: int) -> FlowMatchScheduler: ...

    def shifted_schedule(self, latents: torch.Tensor) -> FlowMatchScheduler: ...

    def step(
        self, scheduler: FlowMatchScheduler, latents: torch.Tensor, progress_id: int, noise_pred: torch.Tensor
    ) -> torch.Tensor: ...


@runtime_checkable
class Task(Protocol):
    """What a step optimises.

    reads: names that ``loss`` takes from the batch and does not write itself, so that the cache must hold them.
    provides: names that ``loss`` gives to the model, so that the cache need not hold them.
    columns: metadata columns that every row must have, each with what reads its value (it raises ValueError, and the
        row is rejected). ``loss`` gets those that it reads as lists, one entry a sample.
    as_sampled: whether the loss runs the family's sampling loop: the model then gets the settings of sampling
        (``BasePipeline.sampling_settings``), and a picture must be used in the size that it was made in.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    provides: ClassVar[tuple[str, ...]]
    columns: ClassVar[Mapping[str, Callable[[Any], Any]]]
    as_sampled: ClassVar[bool]

    def loss(self, pipe: TrainablePipeline, batch: Mapping[str, Any], keys: Sequence[SampleKey]) -> LossOutput: ...


# task family -> "module:Class"; the class is made with the keyword settings of `get_task`.
TASKS: dict[str, str] = {
    "sft": "ray_diffsynth.tasks.sft:SFT",
    "direct_distill": "ray_diffsynth.tasks.direct_distill:DirectDistill",
}


def task_family(task: str) -> str:
    """``"sft:train"`` -> ``"sft"``. An unknown task or stage is a TaskError that lists what exists."""
    family, _, stage = task.partition(":")
    if family not in TASKS or (stage and stage not in STAGES):
        names = [name for known in TASKS for name in (known, *(f"{known}:{s}" for s in STAGES))]
        near = difflib.get_close_matches(task, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TaskError(f"no task is named {task!r}{hint} (tasks: {', '.join(names)})")
    return family


def get_task(task: str, **settings: Any) -> Task:
    """The task object for a task name of any stage, e.g. ``get_task("sft:train", weighting="bell")``.

    A setting of another task is left out: one configuration serves them all. One of no task is a TypeError.
    """
    classes = {name: _task_class(name) for name in TASKS}
    known = {name: {field.name for field in dataclasses.fields(cls)} for name, cls in classes.items()}
    family = task_family(task)
    others = set().union(*known.values()) - known[family]
    own = {name: value for name, value in settings.items() if name not in others}
    return cast(Task, classes[family](**own))


def _task_class(family: str) -> Any:
    module, _, name = TASKS[family].partition(":")
    return getattr(importlib.import_module(module), name)
