"""What one training step optimises: each task turns a batch and its keys into a loss."""

from __future__ import annotations

from ray_diffsynth.tasks.base import TASKS, LossOutput, Task, get_task, task_family
from ray_diffsynth.tasks.direct_distill import DirectDistill
from ray_diffsynth.tasks.sft import SFT

__all__ = ["SFT", "TASKS", "DirectDistill", "LossOutput", "Task", "get_task", "task_family"]
