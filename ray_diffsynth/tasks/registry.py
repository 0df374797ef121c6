"""The names by which a run asks for a task; torch is imported only with a class."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any, cast

from ray_diffsynth.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ray_diffsynth.tasks.base import Task

STAGES = ("data_process", "train")
TASKS: dict[str, str] = {
    "sft": "ray_diffsynth.tasks.sft:SFT",
    "direct_distill": "ray_diffsynth.tasks.direct_distill:DirectDistill",
}
"""Task family -> module:Class; the class is made with the keyword settings of `get_task`."""


class TaskError(UserError):
    """A task name that no task goes by."""


def task_family(task: str) -> str:
    """``"sft:train"`` -> ``"sft"``. An unknown task or stage is a TaskError that lists what exists."""
    family, _, stage = task.partition(":")
    if family not in TASKS or (stage and stage not in STAGES):
        names = [name for known in TASKS for name in (known, *(f"{known}:{s}" for s in STAGES))]
        raise TaskError(f"no task is named {task!r}; {did_you_mean(task, names)}")
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
    return cast("Task", classes[family](**own))


def _task_class(family: str) -> Any:
    module, _, name = TASKS[family].partition(":")
    return getattr(importlib.import_module(module), name)
