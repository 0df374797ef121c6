"""What a job does: the task, by DiffSynth-Studio's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ray_diffsynth.config.options import Component, names_in, option
from ray_diffsynth.errors import ConfigError, did_you_mean
from ray_diffsynth.program import command


@dataclass(frozen=True)
class TaskSpec:
    """What a ``--task`` name stands for: the job that runs it, and whether that job reads a cache."""

    job: Literal["preprocess", "train"]
    reads_cache: bool


TASK_ENDINGS: dict[str, TaskSpec] = {
    "": TaskSpec("train", reads_cache=False),
    ":data_process": TaskSpec("preprocess", reads_cache=False),
    ":train": TaskSpec("train", reads_cache=True),
}
"""End of a task's name -> what it stands for; without one it trains unsplit."""


def task_specs() -> dict[str, TaskSpec]:
    """Every task's name, of each stage."""
    families = names_in("ray_diffsynth.tasks.registry:TASKS")
    return {f"{family}{stage}": spec for family in families for stage, spec in TASK_ENDINGS.items()}


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Component):
    """The task."""

    section = "task"
    title = "What to do"

    task: str = option("sft")
    """What to do: sft:data_process (preprocess), sft:train or the unsplit sft (train)."""

    def resolve(self) -> None:
        """Raise ConfigError for a task that is not known, or that another job runs."""
        specs, job = task_specs(), str(_job_of(self))
        if self.task not in specs:
            raise ConfigError(f"task={self.task!r} is not known; {did_you_mean(self.task, specs)}")
        mine = [name for name, spec in specs.items() if spec.job == job]
        if self.task not in mine:
            other = specs[self.task].job
            raise ConfigError(
                f"task={self.task!r} is run by {command(other)}; {command(job)} runs {' and '.join(mine)}"
            )

    @property
    def reads_cache(self) -> bool:
        """Whether dataset_base_path is a cache."""
        return task_specs()[self.task].reads_cache


def _job_of(config: Any) -> str:
    return str(config.job)
