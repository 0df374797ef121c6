"""What a run reports while it trains: metrics, validation loss, sample images, row warnings, memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, Literal, Self

from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.training.checkpointing import Checkpointing
from ray_diffsynth.training.data.loader import MicrobatchLoader
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.module import DiffusionTrainingModule
from ray_diffsynth.training.optimization import Optimization
from ray_diffsynth.training.precision import Precision
from ray_diffsynth.training.report import memory
from ray_diffsynth.training.report.metrics_log import MetricsLog
from ray_diffsynth.training.report.nonfinite import MicrobatchRecord, dump_not_finite
from ray_diffsynth.training.report.row_warnings import RowWarnings
from ray_diffsynth.training.report.sample_images import TrainingImageSampler
from ray_diffsynth.training.report.step_stats import StepOutcome, Window
from ray_diffsynth.training.report.trackers import Trackers
from ray_diffsynth.training.runtime import WorkerRuntime
from ray_diffsynth.training.validation import ValidationLoss

logger = logging.getLogger(__name__)


class Reporting:
    """Each thing where it is due; a context manager around the steps, within which metrics are written.

    loss, validation_loss: the newest, None before there is one.
    """

    def __init__(
        self, plan: TrainPlan, runtime: WorkerRuntime, checkpointing: Checkpointing, row_warnings: RowWarnings
    ) -> None:
        self._plan, self._config, self._runtime = plan, plan.config, runtime
        self._checkpointing, self.row_warnings = checkpointing, row_warnings
        self.loss: float | None = None
        self.validation_loss: float | None = None
        self._window = Window()
        self._log: MetricsLog | None = None
        self._trackers: Trackers | None = None
        self._sampler: TrainingImageSampler | None = None
        self._module: DiffusionTrainingModule | None = None
        self._stack = ExitStack()

    @property
    def is_main(self) -> bool:
        return self._runtime.world_rank == 0

    def plan(self, validation: ValidationLoss, loader: MicrobatchLoader, total: int) -> None:
        """Once it is known what is trained on. Encodes the prompts of sample images, before the model takes memory."""
        self._validation, self._loader, self._total = validation, loader, total
        samples = self._runtime.own_samples(self._plan)
        self._sampler = TrainingImageSampler(self._plan, samples, self._runtime) if samples else None

    def __enter__(self) -> Self:
        if self.is_main:
            after = self._checkpointing.start
            self._log = MetricsLog(self._plan.output_path, after=after)
            self._trackers = self._stack.enter_context(Trackers(self._plan, after=after))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def log(self, text: str) -> None:
        """Log it once, whatever the number of workers."""
        if self.is_main:
            logger.info(text)

    def log_row_warnings(self) -> None:
        """Log what happened to the rows, over all workers; what was logged before is not logged again."""
        self.row_warnings.gather(self._runtime.world_size)
        for line in self.row_warnings.unreported() if self.is_main else ():
            logger.warning("%s", line)

    def built(self, module: DiffusionTrainingModule) -> None:
        """The model that trains is there: memory is explained by it."""
        self._module = module

    def draw_start(self) -> None:
        """The images of step 0, if the workers draw them."""
        if self._sampler is not None and self._module is not None:
            self._sampler.draw(0, self._module)

    def first_step(self) -> None:
        """Warn of what is known after the first step of this attempt."""
        if self._runtime.device.type == "cuda":
            self.log(memory.report(self.footprint(), self._config, self._runtime.world_size))

    def step(
        self,
        done: int,
        outcome: StepOutcome,
        module: DiffusionTrainingModule,
        optimization: Optimization,
        precision: Precision,
    ) -> None:
        """Validation, metrics, and images of an actor that are due after `done` steps. Every worker must call it."""
        config = self._config
        self.loss = outcome.loss
        self._window.add(outcome)
        extra: dict[str, Any] = {}
        if len(self._validation.rows) and self._is_due(done, config.validation_steps):
            rank, world = self._runtime.world_rank, self._runtime.world_size
            with self.explaining_memory(), optimization.evaluated():
                self.validation_loss = self._validation.loss(module, precision, rank, world)
            extra["validation_loss"] = self.validation_loss
        if self._log is not None and self._trackers is not None:
            if extra or done % config.log_every == 0 or done == self._total:
                metrics = {**self._metrics(done, outcome), **extra}
                self._log.write(metrics)
                self._trackers.write(metrics)
                self._runtime.report(metrics)
                self._window = Window()
            if self._images_due(done) and self._sampler is None:
                self._runtime.draw_samples(done, optimization.weights())

    def flush(self) -> None:
        """Before a checkpoint is written: what is logged up to it must not be lost."""
        if self._log is not None:
            self._log.flush()

    def draw(self, done: int, module: DiffusionTrainingModule, optimization: Optimization) -> None:
        """The images after `done` steps if they are due and the workers draw them; every worker must call it."""
        if self._images_due(done) and self._sampler is not None:
            with optimization.evaluated():
                self._sampler.draw(done, module)

    def explaining_memory(self) -> AbstractContextManager[None]:
        """An allocation that fails in it becomes an error that says what to try."""
        advice = self._checkpointing.restart_advice
        return memory.explained(self.footprint, self._config, self._runtime.world_size, advice)

    def footprint(self) -> memory.Footprint:
        """What the model that trains takes; before it is loaded, about what its files say."""
        if self._module is None:
            return memory.Footprint.planned(self._plan)
        states = 2 if self._config.customized_optimizer is None else 1
        pipe = self._module.pipe
        denoising = [getattr(pipe, name) for name in pipe.in_iteration_models]
        return memory.Footprint.of(self._module, denoising, states, self._runtime.device)

    def not_finite(
        self, step: int, records: Sequence[MicrobatchRecord], what: Literal["loss", "gradient"]
    ) -> TrainingError:
        """The error that ends the run, its samples written down. Every worker must call it."""
        rank, world = self._runtime.world_rank, self._runtime.world_size
        text = dump_not_finite(self._plan.output_path, step, records, what, rank, world)
        return TrainingError(text + self._checkpointing.restart_advice())

    def _is_due(self, done: int, every: int | None) -> bool:
        if done == self._total:
            return True
        return done % every == 0 if every else self._checkpointing.is_due(done)

    def _images_due(self, done: int) -> bool:
        return bool(self._config.validation_prompts) and self._is_due(done, self._config.sample_steps)

    def _metrics(self, done: int, outcome: StepOutcome) -> dict[str, Any]:
        """The line of metrics.jsonl after `done` steps."""
        each = self._loader.samples_per_step
        return {
            "step": done,
            "steps": self._total,
            "epoch": (done - 1) // self._loader.steps_per_epoch,
            "loss": outcome.loss,
            "grad_norm": outcome.grad_norm,
            "learning_rate": outcome.learning_rate,
            "samples": each,
            "samples_seen": done * each,
            "samples_total": self._total * each,
            "workers": self._runtime.world_size,
            **self._window.numbers(each, self._runtime.device),
        }
