"""What is trained and how a step changes it: parameters, optimizer, learning rate, clipping, the moving average."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.training.checkpoint import Checkpoint
from ray_diffsynth.training.distributed import sync_gradients, wrap_ddp
from ray_diffsynth.training.ema import Ema
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.module import DiffusionTrainingModule
from ray_diffsynth.training.optim import (
    OptimizerError,
    base_learning_rate,
    learning_rate,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)
from ray_diffsynth.training.optimizer_modes import evaluated, has_modes, to_training
from ray_diffsynth.training.precision import Precision
from ray_diffsynth.training.state import TrainingState


class Optimization:
    """From the gradients of a step's microbatches to other weights, the same on every worker.

    model: `module`, in DDP where there are several workers. state: all that a checkpoint keeps of it.
    """

    def __init__(
        self,
        module: DiffusionTrainingModule,
        config: TrainConfig,
        precision: Precision,
        *,
        total_steps: int,
        world_size: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        """Raises TrainingError if nothing is trained, OptimizerError, CheckpointError for one of other parameters."""
        self._config, self._precision, self._world_size = config, precision, world_size
        parameters = module.trainable()
        if not parameters:
            raise TrainingError("no trainable parameter reaches the loss; choose other lora_target_modules")
        optimizer = make_optimizer(parameters.values(), config)
        self._learning_rate = learning_rate(config, total_steps, base_learning_rate(optimizer, config))
        ema = Ema(parameters, config.ema_decay) if config.ema_decay else None
        if ema is not None and has_modes(optimizer):
            raise OptimizerError(
                f"--ema_decay and {type(optimizer).__name__} both average the weights: what that one writes is its own "
                "average already; leave --ema_decay out"
            )
        self.state = TrainingState(parameters, optimizer, precision.scaler, ema)
        if checkpoint:
            self.state.restore(checkpoint)
        to_training(optimizer)
        self.model: nn.Module = module if config.shard_base else wrap_ddp(module, world_size)

    @property
    def ema(self) -> Ema | None:
        return self.state.ema

    def begin_step(self, step: int) -> float:
        """Set the learning rate of `step` (from 0), and return it."""
        rate = self._learning_rate(step)
        set_learning_rate(self.state.optimizer, rate)
        return rate

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around a microbatch: only the last one of a step waits for the gradients of the other workers."""
        no_sync = getattr(self.model, "no_sync", None)  # of DDP
        return nullcontext() if last or no_sync is None else no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        self._precision.backward(loss)

    def sync(self) -> None:
        """Bring the gradients together where DDP does not."""
        if self._config.shard_base:
            sync_gradients(self.state.parameters.values(), self._world_size)

    def clip(self) -> float:
        """Bound the norm of the gradients by --max_grad_norm; returns the norm before, which may not be finite."""
        limit = self._config.max_grad_norm or float("inf")  # inf changes nothing and gives the norm
        return self._precision.clip(list(self.state.parameters.values()), self.state.optimizer, limit)

    @property
    def leaves_out_not_finite(self) -> bool:
        """Whether a step with gradients that are not finite is left out, as a gradient scaler does."""
        return self._precision.scaler is not None

    def step(self, step: int) -> None:
        """Change the weights by the gradients, after which there are none; `step` counts from 0."""
        stepped = self._precision.step(self.state.optimizer)
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and stepped:
            self.ema.update(step + 1)

    def evaluated(self) -> AbstractContextManager[None]:
        """Within it the model has the weights that are written, measured and drawn with (schedule-free optimizers)."""
        return evaluated(self.state.optimizer)

    def check_can_be_saved(self) -> None:
        """Raise OptimizerError if a checkpoint cannot hold what the optimizer keeps; ask after the first step."""
        optimizer_state(self.state.optimizer, list(self.state.parameters))

    def is_finite(self) -> bool:
        """Whether all trained weights are finite."""
        return all(bool(torch.isfinite(p.detach()).all()) for p in self.state.parameters.values())

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the trained weights by name, on the CPU, as they are written."""
        with self.evaluated():
            return {name: p.detach().cpu().clone() for name, p in self.state.parameters.items()}
