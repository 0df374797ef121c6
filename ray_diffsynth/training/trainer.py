"""The training loop, without Ray: one optimizer step is one microbatch from every virtual rank of the epoch order."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, cast

import torch
from torch import nn

from ray_diffsynth.data.warnings import DataWarnings, collecting
from ray_diffsynth.diffusion.randomness import generator
from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.tasks import LossOutput
from ray_diffsynth.training.build import build_module
from ray_diffsynth.training.checkpointing import Checkpointing
from ray_diffsynth.training.data.epoch_order import virtual_ranks_of
from ray_diffsynth.training.data.loader import Microbatch, MicrobatchLoader
from ray_diffsynth.training.data.opening import open_data
from ray_diffsynth.training.data.source import CacheSource
from ray_diffsynth.training.distributed import all_equal, all_reduce_sum, init_distributed
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.export import describe
from ray_diffsynth.training.identity import identity
from ray_diffsynth.training.length import describe_length, total_steps
from ray_diffsynth.training.lr_schedules import LR_SCHEDULES
from ray_diffsynth.training.module import fix_unused, freeze
from ray_diffsynth.training.optimization import Optimization
from ray_diffsynth.training.precision import Precision
from ray_diffsynth.training.quantize import describe_packed
from ray_diffsynth.training.report.nonfinite import MicrobatchRecord
from ray_diffsynth.training.report.reporting import Reporting
from ray_diffsynth.training.report.row_warnings import RowWarnings
from ray_diffsynth.training.report.step_stats import SIGMA_BUCKETS, StepOutcome, StepSums
from ray_diffsynth.training.report.trackers import check_trackers
from ray_diffsynth.training.result import TrainResult
from ray_diffsynth.training.runtime import WorkerRuntime
from ray_diffsynth.training.shard import check_equal_work, shard_base
from ray_diffsynth.training.validation import ValidationLoss, choose_rows

Batches = Iterator[tuple[Microbatch, Sequence[dict[str, Any]]]]


def train(plan: TrainPlan, runtime: WorkerRuntime) -> TrainResult:
    """Train from the newest checkpoint in `plan.output_path` (or from the start) to the end, or until asked to stop.

    Raises UserErrors: a model that this machine does not have, a checkpoint of another run, a loss that is not finite,
    a damaged cache, too little memory.
    """
    plan = plan.on_this_machine()
    check_trackers(plan.config)
    init_distributed(runtime)
    with collecting() as own:
        return Trainer(plan, runtime, own).run()


class Trainer:
    """One attempt: from a checkpoint, or the start, onwards.

    optimization: what a step changes. checkpointing: what is kept of it. reporting: what is reported of it.
    """

    def __init__(self, plan: TrainPlan, runtime: WorkerRuntime, own: DataWarnings) -> None:
        """own: where warnings of the data on this worker are collected."""
        self.plan, self.runtime, self.config = plan, runtime, plan.config
        self.precision = Precision(runtime.device, self.config.dtype)
        self.data = open_data(plan)
        self.checkpointing = Checkpointing(plan, runtime)
        warnings = RowWarnings(own, self.checkpointing.position("warnings", ()))
        self.reporting = Reporting(plan, runtime, self.checkpointing, warnings)
        self.reporting.log_row_warnings()
        if not all_equal(zlib.crc32(self.data.identity.encode()), runtime.world_size, runtime.device):
            raise TrainingError(
                f"the workers see different samples in {self.config.dataset_base_path}; all nodes must see the same "
                "files"
            )
        self._plan_steps()
        self._build()

    def _plan_steps(self) -> None:
        """Fix the order of samples and the number of steps, before the model is loaded."""
        config, runtime = self.config, self.runtime
        # Fixed when the run starts, so that another number of workers trains the same batches.
        virtual_ranks = max(runtime.world_size, config.worker_range[1]) * config.gradient_accumulation_steps
        virtual_ranks = int(self.checkpointing.position("lanes", virtual_ranks))
        rows = choose_rows(config.validation_samples, len(self.data.sample_ids), config.seed)
        self.validation = ValidationLoss(self.data, rows, config.seed, config.batch_size, config.shard_base)
        self.loader = MicrobatchLoader(
            self.data,
            config.seed,
            config.batch_size,
            virtual_ranks,
            config.dataset_repeat,
            held_out=tuple(int(row) for row in rows),
            caption_dropout=config.caption_dropout,
            pin=runtime.device.type == "cuda",
        )
        if config.caption_dropout:
            self.data.empty_caption()  # raises now if there is none
        per_epoch = self.loader.steps_per_epoch
        self.total = total_steps(config.num_epochs, config.max_steps, per_epoch)
        if config.num_epochs is not None and config.max_steps is not None:
            self.reporting.log(describe_length(config.num_epochs, config.max_steps, per_epoch))
        if config.lr_warmup_steps >= self.total:
            raise TrainingError(
                f"--lr_warmup_steps {config.lr_warmup_steps} leaves nothing of the run's {self.total} steps: the "
                "learning rate would never be reached; warm up for fewer steps, or train longer"
            )
        found = identity(self.plan, self.data)
        if LR_SCHEDULES[config.lr_scheduler].depends_on_length:
            found["lr_total_steps"] = self.total
        counts = {
            "samples": len(self.data.sample_ids),
            "num_epochs": config.num_epochs,
            "max_steps": config.max_steps,
        }
        self.checkpointing.begin(found, counts, steps_per_epoch=per_epoch, total=self.total)
        if isinstance(self.data, CacheSource):
            self.data.keep_open_for(len(virtual_ranks_of(runtime.world_rank, runtime.world_size, virtual_ranks)))
        self.reporting.plan(self.validation, self.loader, self.total)

    def _build(self) -> None:
        """Load the model, put the checkpoint in, and make optimizer and DDP."""
        config, device, world = self.config, self.runtime.device, self.runtime.world_size
        checkpoint, reporting = self.checkpointing.found, self.reporting
        with reporting.explaining_memory():
            self.module, self.trained = build_module(
                self.plan, device, fresh=checkpoint is None, on_cpu=config.shard_base
            )
        reporting.built(self.module)
        with reporting.explaining_memory():
            if config.shard_base:
                shard_base(self.module, device, world, self.loader.virtual_ranks)
            self.unused: list[str] = checkpoint.position["unused"] if checkpoint else self._probe()
            freeze(self.module, self.unused)
            self.optimization = Optimization(
                self.module, config, self.precision, total_steps=self.total, world_size=world, checkpoint=checkpoint
            )
        self.checkpointing.forget()
        if checkpoint is None:
            reporting.draw_start()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # what loading took is not what a step takes
        reporting.log(describe(self.trained, list(self.optimization.state.parameters.values())))
        for name in self.module.pipe.in_iteration_models if config.fp8_base else ():
            reporting.log(describe_packed(name, getattr(self.module.pipe, name)))
        if checkpoint:
            reporting.log(
                f"going on from step {self.checkpointing.start} of {self.total}, saved in "
                f"{self.plan.output_path}/checkpoints"
            )

    def run(self) -> TrainResult:
        started = time.monotonic()
        start = done = self.checkpointing.start
        rank, world = self.runtime.world_rank, self.runtime.world_size
        batches = self.loader.read(done, self.total, rank, world, self.config.dataset_num_workers)
        with self.reporting as reporting, closing(batches), self.checkpointing:
            while done < self.total:
                with reporting.explaining_memory():
                    outcome = self._step(done, batches)
                done += 1
                if done == start + 1:
                    self.optimization.check_can_be_saved()
                    reporting.first_step()
                self._after(done, outcome)
                if done == start + self.loader.steps_per_epoch:  # every sample was met
                    reporting.log_row_warnings()
                if outcome.stop:
                    self.checkpointing.wait()
                    reporting.log(f"asked to stop: saved step {done}, run the same command again to go on")
                    break
        reporting.log_row_warnings()
        return self._result(done, time.monotonic() - started)

    def _step(self, step: int, batches: Batches) -> StepOutcome:
        """One optimizer step."""
        optimization, world = self.optimization, self.runtime.world_size
        began, data_wait = time.perf_counter(), 0.0
        # DDP divides by the number of workers; what is wanted is the mean over the virtual ranks.
        scale = world / self.loader.virtual_ranks
        sums = StepSums.zeros(self.runtime.device)
        sums.values[1] = self.runtime.stop_requested()
        rate = optimization.begin_step(step)
        records: list[MicrobatchRecord] = []
        last = False
        while not last:
            asked = time.perf_counter()
            microbatch, samples = next(batches)
            data_wait += time.perf_counter() - asked
            last = microbatch.last
            with optimization.accumulating(last=last):
                output = self._forward(optimization.model, microbatch, samples)
                optimization.backward(output.loss * scale)
            records.append(MicrobatchRecord(microbatch, samples, output))
            sums.add(output.loss, output.per_sample, output.sigma)
        optimization.sync()
        loss_sum, stops, *by_sigma = all_reduce_sum(sums.values, world).tolist()
        if not math.isfinite(loss_sum):  # known to every worker, so that all of them end
            raise self.reporting.not_finite(step, records, "loss")
        norm = optimization.clip()
        if not (math.isfinite(norm) or optimization.leaves_out_not_finite):
            raise self.reporting.not_finite(step, records, "gradient")
        optimization.step(step)
        return StepOutcome(
            loss=loss_sum / self.loader.virtual_ranks,
            grad_norm=norm,
            learning_rate=rate,
            data_wait=data_wait,
            seconds=time.perf_counter() - began,
            stop=stops > 0,
            sigma_sums=by_sigma[:SIGMA_BUCKETS],
            sigma_counts=by_sigma[SIGMA_BUCKETS:],
        )

    def _forward(self, model: nn.Module, microbatch: Microbatch, samples: Sequence[dict[str, Any]]) -> LossOutput:
        if self.config.shard_base:
            check_equal_work(samples, self.runtime.world_size, self.runtime.device)
        # Dropout and whatever else of a model draws from the global generator is keyed like the rest: by position.
        seed = generator("model", self.config.seed, microbatch.step, microbatch.virtual_rank).initial_seed()
        torch.manual_seed(seed)
        with self.precision.autocast():
            return cast(LossOutput, model(samples, microbatch.keys))

    def _probe(self) -> list[str]:
        """Find the parameters that no gradient reaches, on the run's first microbatch: the same on every worker."""
        first = next(self.loader.microbatches(0, 1, 0, 1))
        output = self._forward(self.module, first, self.loader.fetch(first))
        unused = fix_unused(self.module, output.loss)
        if unused:
            named = ", ".join(unused[:4])
            self.reporting.log(f"{len(unused)} of the trained parameters get no gradient and stay as they are: {named}")
        return unused

    def _after(self, done: int, outcome: StepOutcome) -> None:
        """What is due after `done` steps."""
        self.checkpointing.raise_failed()
        self.reporting.step(done, outcome, self.module, self.optimization, self.precision)
        save = self.checkpointing.is_due(done)
        if save or outcome.stop:
            self.reporting.flush()
            self._save(done, export=save)
        if not outcome.stop:
            self.reporting.draw(done, self.module, self.optimization)

    def _save(self, done: int, *, export: bool) -> None:
        if not self.optimization.is_finite():
            raise TrainingError(
                f"step {done}: the trained weights are not finite; no file was written of them: lower --learning_rate"
                + self.checkpointing.restart_advice()
            )
        warnings = self.reporting.row_warnings
        warnings.gather(self.runtime.world_size)
        if self.runtime.world_rank == 0:
            position = {"lanes": self.loader.virtual_ranks, "unused": self.unused, "warnings": warnings.all.rows()}
            self.checkpointing.save(
                done, self.optimization, self.module.pipe, self.trained, export=export, position=position
            )

    def _result(self, done: int, seconds: float) -> TrainResult:
        loader, config = self.loader, self.config
        entries = loader.steps_per_epoch * loader.samples_per_step
        return TrainResult(
            steps=done,
            total=self.total,
            started_at=self.checkpointing.start,
            steps_per_epoch=loader.steps_per_epoch,
            samples=len(self.data.sample_ids),
            padded=entries - config.dataset_repeat * loader.trained_samples,
            loss=self.reporting.loss,
            seconds=seconds,
            files=self.checkpointing.files,
            checkpoint=self.checkpointing.saved,
            unused=len(self.unused),
            held_out=len(self.validation.rows),
            validation_loss=self.reporting.validation_loss,
            warnings=self.reporting.row_warnings.all.rows(),
        )
