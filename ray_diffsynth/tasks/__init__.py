"""What one training step optimises: each task turns a batch and its keys into a loss.

Names are imported on first use, so that the registry stays free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_diffsynth.lazy import importer

if TYPE_CHECKING:
    from ray_diffsynth.tasks.base import LossOutput as LossOutput
    from ray_diffsynth.tasks.base import Task as Task
    from ray_diffsynth.tasks.direct_distill import DirectDistill as DirectDistill
    from ray_diffsynth.tasks.registry import TASKS as TASKS
    from ray_diffsynth.tasks.registry import get_task as get_task
    from ray_diffsynth.tasks.registry import task_family as task_family
    from ray_diffsynth.tasks.sft import SFT as SFT

__getattr__ = importer(
    __name__,
    {
        "DirectDistill": "direct_distill",
        "LossOutput": "base",
        "SFT": "sft",
        "TASKS": "registry",
        "Task": "base",
        "get_task": "registry",
        "task_family": "registry",
    },
)
