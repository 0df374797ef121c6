"""What a run goes on from and what it leaves to go on from: which checkpoint, what is saved when, the LoRA files."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.training.attempt import Attempt
from ray_diffsynth.training.background import BackgroundWriter
from ray_diffsynth.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints_folder,
    list_checkpoints,
    newest_checkpoint,
    save_checkpoint,
)
from ray_diffsynth.training.distributed import all_equal
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.export import Trained, TrainedFile, newest_file, trained_files
from ray_diffsynth.training.identity import check_identity, identity_defaults
from ray_diffsynth.training.optimization import Optimization
from ray_diffsynth.training.runtime import WorkerRuntime
from ray_diffsynth.training.start import mark_going_on


class Checkpointing:
    """The checkpoints and weight files of one attempt; a context manager around its steps that waits for the last save.

    found: the checkpoint that it goes on from, until `forget`; start: its step, 0 in a new run. files: what was
    exported; saved: folder of the newest checkpoint that was written. Both are behind by what is still being written.
    """

    def __init__(self, plan: TrainPlan, runtime: WorkerRuntime) -> None:
        """Raises CheckpointError, and TrainingError if the workers see different checkpoints."""
        self._plan, self._config, self._runtime = plan, plan.config, runtime
        self.found = newest_checkpoint(plan.output_path)
        self.start = self.found.step if self.found else 0
        self.files: list[str] = []
        self.saved: str | None = None
        self._attempt = Attempt(plan.output_path)
        self._writer = BackgroundWriter()
        if not all_equal(self.start, runtime.world_size, runtime.device):
            raise TrainingError(
                f"the workers see different checkpoints in {plan.output_path}; all nodes must share --output_path"
            )

    def position(self, name: str, otherwise: Any) -> Any:
        """What the checkpoint says of the run's position, `otherwise` in a new run or if it does not say."""
        return self.found.position.get(name, otherwise) if self.found else otherwise

    def begin(self, identity: dict[str, Any], counts: dict[str, Any], *, steps_per_epoch: int, total: int) -> None:
        """Fix what the checkpoints of this run are compared by, and compare the one that it goes on from.

        counts: numbers that a message about two different runs names. Raises CheckpointError for one of another run,
        or beyond the run's `total` steps.
        """
        self._identity, self._counts = identity, counts
        self._steps_per_epoch, self._total = steps_per_epoch, total
        found = self.found
        if found is None:
            return
        where = f"{checkpoints_folder(self._plan.output_path)}/{found.name}"
        defaults = identity_defaults(self._plan)
        check_identity(found.identity, identity, where, defaults, positions=(found.position, counts))
        if found.step > total:
            raise CheckpointError(
                f"the checkpoint {where} is beyond the {total} steps that this command asks for; raise max_steps or "
                "num_epochs, go back with --resume <an earlier checkpoint>, or start anew with another --output_path"
            )
        if self._runtime.world_rank == 0:
            mark_going_on(self._config)

    def forget(self) -> None:
        """Let go of the checkpoint's tensors: they are in the model."""
        self.found = None

    def is_due(self, done: int) -> bool:
        """Whether a checkpoint and weights are written after `done` steps."""
        every = self._config.save_steps or self._steps_per_epoch
        return done == self._total or done % every == 0

    def save(
        self,
        done: int,
        optimization: Optimization,
        pipe: BasePipeline,
        trained: Trained,
        *,
        export: bool,
        position: dict[str, Any],
    ) -> None:
        """Copy what is trained now; LoRA files and checkpoint are written from the copy while the steps go on.

        The files first, then the checkpoint: a kill in between costs the steps since the last one, never a file. Waits
        while the save before is still being written, so that main memory holds one copy, and no save is left out; the
        error of that one is raised. position: JSON values beside the step, see `Checkpoint`. Called by rank 0.
        """
        self._writer.wait()
        files: list[TrainedFile] = []
        if export:
            by_epoch = self._config.save_steps is None and done % self._steps_per_epoch == 0
            name = f"epoch-{done // self._steps_per_epoch - 1}" if by_epoch else f"step-{done}"
            with optimization.evaluated():
                files += self._trained_files(pipe, trained, name)
            if optimization.ema is not None:
                with optimization.ema.applied():
                    files += self._trained_files(pipe, trained, f"{name}.ema")
        position = {"epoch": done // self._steps_per_epoch, **self._counts, **position}
        checkpoint = optimization.state.checkpoint(done, self._identity, position).snapshot()
        self._writer.start(lambda: self._write(files, checkpoint))

    def _trained_files(self, pipe: BasePipeline, trained: Trained, name: str) -> list[TrainedFile]:
        return trained_files(pipe, trained, self._plan.output_path, name, layout=self._config.lora_format)

    def _write(self, files: Sequence[TrainedFile], checkpoint: Checkpoint) -> None:
        for file in files:
            self._attempt.check()
            file.write()
            self.files.append(file.path)
        self._attempt.check()
        self.saved = save_checkpoint(self._plan.output_path, checkpoint, self._config.keep_checkpoints)

    def raise_failed(self) -> None:
        """Raise the error of a save that could not be written; waits for none."""
        self._writer.raise_failed()

    def wait(self) -> None:
        """Wait until what was saved is written; raises the error of what could not be."""
        self._writer.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"and the last save could not be written: {type(failed).__name__}: {failed}")

    def restart_advice(self) -> str:
        """How to go on with other options, which a checkpoint refuses; nothing before there is one."""
        output_path = self._plan.output_path
        if not list_checkpoints(output_path):
            return ""
        file = newest_file(output_path, self._steps_per_epoch, self._total) if self._config.lora_models else None
        weights = f" and --lora_checkpoint {file}" if file else ""
        return f". Other options make another run: start it with another --output_path{weights}"
