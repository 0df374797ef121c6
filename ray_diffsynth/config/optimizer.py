"""The optimizer: which, with what, on how much at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.config.effects import ADAMW, needs
from ray_diffsynth.config.options import Component, option, set_option
from ray_diffsynth.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Component):
    """AdamW, or an optimizer of the user's own."""

    section = "optimizer"
    title = "Optimisation"

    learning_rate: float | None = option(None, least=0.0)
    """Learning rate; when not given 1e-4 for AdamW, and customized_optimizer's own default."""
    weight_decay: float | None = option(None, least=0.0)
    """Weight decay; when not given 0.01 for AdamW, and customized_optimizer's own default."""
    max_grad_norm: float = option(1.0, least=0.0)
    """Gradients are clipped to this norm; 0 turns clipping off."""
    gradient_accumulation_steps: int = option(1, least=1)
    """Batches of each worker that make one optimizer step."""
    adam_beta1: float | None = option(None, below=1, used_as=0.9, effects=(ADAMW,))
    """AdamW's decay of the mean; 0.9 when not given."""
    adam_beta2: float | None = option(None, below=1, used_as=0.999, effects=(ADAMW,))
    """AdamW's decay of the variance; 0.999 when not given."""
    # Without one AdamW divides 0 by 0: the gradients of a LoRA start at 0.
    adam_epsilon: float | None = option(None, least=1e-30, most=1.0, used_as=1e-8, effects=(ADAMW,))
    """AdamW's epsilon; 1e-8 when not given."""
    customized_optimizer: str | None = None
    """Optimizer by import path, module:Class, e.g. torch.optim:RMSprop, or of a module in the working folder; AdamW
    when not given."""
    optimizer_arguments: dict[str, Any] | None = option(None, effects=(needs("customized_optimizer"),))
    """Further arguments of customized_optimizer, e.g. {"momentum": 0.9}."""
    ema_decay: float = option(0.0, below=1)
    """Decay of a moving average of the weights, e.g. 0.999, written beside them as *.ema.safetensors; 0 is none."""

    def resolve(self) -> None:
        """AdamW has defaults of ours; another optimizer keeps its own."""
        if self.customized_optimizer is None:
            rate, decay = self.learning_rate, self.weight_decay
            set_option(
                self, learning_rate=1e-4 if rate is None else rate, weight_decay=0.01 if decay is None else decay
            )

    def check(self) -> None:
        """Raise ConfigError for an optimizer that trains nothing or cannot be made."""
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate} trains nothing; use a number above 0, e.g. 1e-4")
        if self.customized_optimizer and not re.fullmatch(r"[\w.]+[:.]\w+", self.customized_optimizer):
            raise ConfigError(
                f"customized_optimizer={self.customized_optimizer!r} is no import path; write module:Class, "
                "e.g. torch.optim:RMSprop"
            )
        arguments = self.optimizer_arguments or {}
        if "lr" in arguments:
            raise ConfigError("optimizer_arguments names lr, which the schedule sets in each step; use learning_rate")
        if "weight_decay" in arguments and self.weight_decay is not None:
            raise ConfigError("weight_decay is given twice, also in optimizer_arguments; leave one of them out")
