"""How long a run is, and the course of its learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from ray_diffsynth.config.options import Component, option, set_option
from ray_diffsynth.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Component):
    """Epochs, steps and the learning rate over them."""

    section = "schedule"
    title = "Optimisation"

    num_epochs: int | None = option(None, least=1, identity=False)
    """Passes over the data, each dataset_repeat times as long as the data; 1 when max_steps is not given either."""
    max_steps: int | None = option(None, least=1, identity=False)
    """Optimizer steps, in as many passes as they take; with num_epochs the smaller of the two ends the run."""
    dataset_repeat: int = option(1, least=1, group="Data")
    """How often every sample is seen in one epoch."""
    lr_scheduler: str = option("constant", names="ray_diffsynth.training.lr_schedules:LR_SCHEDULES")
    """Course of the learning rate, as in diffusers; those that fall end at the run's last step."""
    lr_warmup_steps: int = option(0, least=0)
    """Steps over which the learning rate rises from 0."""

    def resolve(self) -> None:
        """A warm-up makes the constant schedule the one that has it."""
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            set_option(self, lr_scheduler="constant_with_warmup")

    def check(self) -> None:
        """Raise ConfigError for a warm-up that never ends, or that is missing."""
        if self.lr_scheduler == "constant_with_warmup" and not self.lr_warmup_steps:
            raise ConfigError("lr_scheduler=constant_with_warmup needs lr_warmup_steps; give that too, or use constant")
        if self.max_steps is not None and self.lr_warmup_steps >= self.max_steps:
            raise ConfigError(
                f"lr_warmup_steps={self.lr_warmup_steps} leaves nothing of max_steps={self.max_steps}: the learning "
                "rate would never be reached; warm up for fewer steps, or train longer"
            )
