"""The training loop, without Ray: one optimizer step is one microbatch from every lane of the plan."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import nn

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.data.warnings import DataWarnings, collecting
from ray_diffsynth.diffusion.randomness import generator
from ray_diffsynth.tasks import LossOutput
from ray_diffsynth.training.build import build_module
from ray_diffsynth.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    newest_checkpoint,
    save_checkpoint,
)
from ray_diffsynth.training.data.epoch_order import lanes_of
from ray_diffsynth.training.data.loader import Feed, Microbatch
from ray_diffsynth.training.data.source import CacheSource
from ray_diffsynth.training.distributed import accelerator, distribute, same_everywhere, sync_gradients, total
from ray_diffsynth.training.ema import Ema
from ray_diffsynth.training.export import Trained, describe, export_trained, newest_file
from ray_diffsynth.training.identity import check_identity
from ray_diffsynth.training.length import describe_length, total_steps
from ray_diffsynth.training.lr_schedules import LR_SCHEDULES
from ray_diffsynth.training.module import DiffusionTrainingModule, fix_unused, freeze
from ray_diffsynth.training.optim import (
    OptimizerError,
    base_learning_rate,
    learning_rate,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)
from ray_diffsynth.training.optimizer_modes import evaluated, has_modes, to_training
from ray_diffsynth.training.quantize import describe_packed
from ray_diffsynth.training.report import memory
from ray_diffsynth.training.report.metrics_log import MetricsLog
from ray_diffsynth.training.report.nonfinite import Seen, dump_not_finite
from ray_diffsynth.training.report.row_warnings import SaidOfData
from ray_diffsynth.training.report.sample_images import WorkerSampler
from ray_diffsynth.training.report.step_stats import SIGMA_BUCKETS, StepOutcome, StepSums, Window
from ray_diffsynth.training.report.trackers import Trackers, check_trackers
from ray_diffsynth.training.result import TrainResult
from ray_diffsynth.training.runtime import Context
from ray_diffsynth.training.setup import Setup, TrainingError
from ray_diffsynth.training.shard import check_equal_work, shard_base
from ray_diffsynth.training.start import mark_going_on
from ray_diffsynth.training.state import TrainingState
from ray_diffsynth.training.validation import HeldOut, choose_rows

logger = logging.getLogger(__name__)

Batches = Iterator[tuple[Microbatch, Sequence[dict[str, Any]]]]


def train(config: TrainConfig, context: Context) -> TrainResult:
    """Train from the newest checkpoint in `config.output_path` (or from the start) to the end, or until asked to stop.

    Raises UserErrors: what `Setup.of` checks, a checkpoint of another run, a loss that is not finite, a damaged cache,
    too little memory.
    """
    setup = Setup.of(config)
    check_trackers(config)
    with accelerator(context, config.dtype) as engine, collecting() as own:
        return _Run(setup, context, engine, own).run()


class _Run:
    """One attempt: from a checkpoint, or the start, onwards."""

    def __init__(self, setup: Setup, context: Context, engine: Accelerator, own: DataWarnings) -> None:
        self.setup, self.context, self.engine = setup, context, engine
        self.config = setup.config
        self.loss: float | None = None
        self.validation_loss: float | None = None
        self.files: list[str] = []
        self.saved: str | None = None
        self.data = setup.open_data()
        self.identity = setup.identity(self.data)
        checkpoint = newest_checkpoint(setup.output_path)
        self.start = checkpoint.step if checkpoint else 0
        if not same_everywhere(self.start, context.world_size, context.device):
            raise TrainingError(
                f"the workers see different checkpoints in {setup.output_path}; all nodes must share --output_path"
            )
        self.said = SaidOfData(own, checkpoint.position.get("warnings", ()) if checkpoint else ())
        self._tell_of_data()
        if not same_everywhere(zlib.crc32(self.data.identity.encode()), context.world_size, context.device):
            raise TrainingError(
                f"the workers see different samples in {self.config.dataset_base_path}; all nodes must see the same "
                "files"
            )
        self._plan(checkpoint)
        samples = context.own_samples(setup)
        self.sampler = WorkerSampler(setup, samples, context) if samples else None  # before the model takes memory
        self.module: DiffusionTrainingModule
        self.trained: Trained
        self._build(checkpoint)
        if checkpoint:
            self._say(f"going on from step {self.start} of {self.total}, saved in {setup.output_path}/checkpoints")

    def _plan(self, checkpoint: Checkpoint | None) -> None:
        """Fix the order of samples and the number of steps."""
        config, context = self.config, self.context
        # Fixed when the run starts, so that another number of workers trains the same batches.
        lanes = max(context.world_size, config.worker_range[1]) * config.gradient_accumulation_steps
        if checkpoint:
            lanes = int(checkpoint.position["lanes"])
        held_out = choose_rows(config.validation_samples, len(self.data.sample_ids), config.seed)
        self.held_out = HeldOut(self.data, held_out, config.seed, config.batch_size, config.shard_base)
        rows = tuple(int(row) for row in held_out)
        self.feed = Feed(
            self.data,
            config.seed,
            config.batch_size,
            lanes,
            config.dataset_repeat,
            held_out=rows,
            caption_dropout=config.caption_dropout,
            pin=context.device.type == "cuda",
        )
        if config.caption_dropout:
            self.data.empty_caption()  # raises now if there is none
        self.per_epoch = self.feed.steps_per_epoch
        self.total = total_steps(config.num_epochs, config.max_steps, self.per_epoch)
        if config.num_epochs is not None and config.max_steps is not None:
            self._say(describe_length(config.num_epochs, config.max_steps, self.per_epoch))
        if config.lr_warmup_steps >= self.total:
            raise TrainingError(
                f"--lr_warmup_steps {config.lr_warmup_steps} leaves nothing of the run's {self.total} steps: the "
                "learning rate would never be reached; warm up for fewer steps, or train longer"
            )
        if LR_SCHEDULES[config.lr_scheduler].depends_on_length:
            self.identity["lr_total_steps"] = self.total
        if checkpoint:
            where = f"{self.setup.output_path}/checkpoints/{checkpoint.name}"
            check_identity(
                checkpoint.identity,
                self.identity,
                where,
                self.setup.identity_defaults(),
                positions=(checkpoint.position, self._counts()),
            )
            if checkpoint.step > self.total:
                raise CheckpointError(
                    f"the checkpoint {where} is beyond the {self.total} steps that this command asks for; raise "
                    "max_steps or num_epochs, go back with --resume <an earlier checkpoint>, or start anew with "
                    "another --output_path"
                )
            if self.is_main:
                mark_going_on(config)
        if isinstance(self.data, CacheSource):
            self.data.serve(len(lanes_of(context.world_rank, context.world_size, lanes)))

    def _build(self, checkpoint: Checkpoint | None) -> None:
        """Load the model, put the checkpoint in, and make optimizer and DDP."""
        config, world = self.config, self.context.world_size
        device = self.context.device
        with memory.explained(self.setup.footprint, config, world, self._restart):
            fresh = checkpoint is None
            self.module, self.trained = build_module(self.setup, device, fresh=fresh, on_cpu=config.shard_base)
        with self._memory_explained():
            self._prepare(checkpoint)
        if self.sampler is not None and checkpoint is None:
            self.sampler.draw(0, self.module)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # what loading took is not what a step takes
        self._say(describe(self.trained, list(self.state.parameters.values())))
        for name in self.module.pipe.in_iteration_models if config.fp8_base else ():
            self._say(describe_packed(name, getattr(self.module.pipe, name)))

    def _prepare(self, checkpoint: Checkpoint | None) -> None:
        """From the loaded module to one that can be trained."""
        config, world, device = self.config, self.context.world_size, self.context.device
        if config.shard_base:
            shard_base(self.module, device, world, self.feed.lanes)
        self.unused: list[str] = checkpoint.position["unused"] if checkpoint else self._probe()
        freeze(self.module, self.unused)
        parameters = self.module.trainable()
        if not parameters:
            raise TrainingError("no trainable parameter reaches the loss; choose other lora_target_modules")
        optimizer = make_optimizer(parameters.values(), config)
        self.learning_rate = learning_rate(config, self.total, base_learning_rate(optimizer, config))
        ema = Ema(parameters, config.ema_decay) if config.ema_decay else None
        self.state = TrainingState(parameters, optimizer, getattr(self.engine, "scaler", None), ema)
        if ema is not None and has_modes(optimizer):
            raise OptimizerError(
                f"--ema_decay and {type(optimizer).__name__} both average the weights: what that one writes is its own "
                "average already; leave --ema_decay out"
            )
        if checkpoint:
            self.state.restore(checkpoint)
        to_training(optimizer)
        self.optimizer: Any = self.engine.prepare_optimizer(optimizer)
        self.model: nn.Module = self.module if config.shard_base else distribute(self.module, world)

    @property
    def is_main(self) -> bool:
        return self.context.world_rank == 0

    def run(self) -> TrainResult:
        started = time.monotonic()
        done = self.start
        rank, world = self.context.world_rank, self.context.world_size
        self.window = Window()
        with ExitStack() as stack:
            self.log = MetricsLog(self.setup.output_path, after=done) if self.is_main else None
            self.trackers = stack.enter_context(Trackers(self.setup, after=done)) if self.is_main else None
            batches = self.feed.read(done, self.total, rank, world, self.config.dataset_num_workers)
            stack.enter_context(closing(batches))
            while done < self.total:
                with self._memory_explained():
                    outcome = self._step(done, batches)
                done += 1
                if done == self.start + 1:
                    self._after_first()
                self._after(done, outcome)
                if done == self.start + self.per_epoch:  # every sample was met
                    self._tell_of_data()
                if outcome.stop:
                    self._say(f"asked to stop: saved step {done}, run the same command again to go on")
                    break
        self._tell_of_data()
        trained = self.feed.trained_samples
        return TrainResult(
            steps=done,
            total=self.total,
            started_at=self.start,
            steps_per_epoch=self.per_epoch,
            samples=len(self.data.sample_ids),
            padded=self.per_epoch * self.feed.samples_per_step - self.config.dataset_repeat * trained,
            loss=self.loss,
            seconds=time.monotonic() - started,
            files=self.files,
            checkpoint=self.saved,
            unused=len(self.unused),
            held_out=len(self.held_out.rows),
            validation_loss=self.validation_loss,
            warnings=self.said.all.rows(),
        )

    def _after_first(self) -> None:
        """What the first step of this attempt shows."""
        optimizer_state(self.state.optimizer, list(self.state.parameters))  # raises now if no checkpoint can hold it
        if self.context.device.type == "cuda":
            self._say(memory.report(self._footprint(), self.config, self.context.world_size))

    def _after(self, done: int, outcome: StepOutcome) -> None:
        """Validation, the log, sample pictures and checkpoints that are due after `done` steps."""
        save, config = self._save_due(done), self.config
        draw = bool(config.validation_prompts) and (done == self.total or self._due(done, config.sample_steps))
        self.loss = outcome.loss
        self.window.add(outcome)
        extra: dict[str, Any] = {}
        if len(self.held_out.rows) and (done == self.total or self._due(done, config.validation_steps)):
            rank, world = self.context.world_rank, self.context.world_size
            with self._memory_explained(), evaluated(self.state.optimizer):
                self.validation_loss = self.held_out.loss(self.module, self.engine, rank, world)
            extra["validation_loss"] = self.validation_loss
        if self.log is not None and self.trackers is not None:
            if extra or done % config.log_every == 0 or done == self.total:
                metrics = {**self._metrics(done, outcome), **extra}
                self.log.write(metrics)
                self.trackers.write(metrics)
                self.context.report(metrics)
                self.window = Window()
            if draw and self.sampler is None:
                with evaluated(self.state.optimizer):
                    weights = {name: p.detach().cpu().clone() for name, p in self.state.parameters.items()}
                self.context.draw_samples(done, weights)
        if save or outcome.stop:
            self._save(done, export=save)
            if self.log is not None:
                self.log.flush()
        if draw and self.sampler is not None and not outcome.stop:
            with evaluated(self.state.optimizer):
                self.sampler.draw(done, self.module)

    def _memory_explained(self) -> AbstractContextManager[None]:
        return memory.explained(self._footprint, self.config, self.context.world_size, self._restart)

    def _restart(self) -> str:
        """How to go on with other options, which a checkpoint refuses; nothing before there is one."""
        if not list_checkpoints(self.setup.output_path):
            return ""
        file = newest_file(self.setup.output_path, self.per_epoch, self.total) if self.config.lora_models else None
        weights = f" and --lora_checkpoint {file}" if file else ""
        return f". Other options make another run: start it with another --output_path{weights}"

    def _not_finite(self, step: int, seen: Sequence[Seen], what: Literal["loss", "gradient"]) -> TrainingError:
        rank, world = self.context.world_rank, self.context.world_size
        return TrainingError(dump_not_finite(self.setup.output_path, step, seen, what, rank, world) + self._restart())

    def _step(self, step: int, batches: Batches) -> StepOutcome:
        """One optimizer step."""
        world = self.context.world_size
        began, waited = time.perf_counter(), 0.0
        # DDP divides by the number of workers; what is wanted is the mean over the lanes.
        scale = world / self.feed.lanes
        sums = StepSums.zeros(self.context.device)
        sums.values[1] = self.context.stop_requested()
        rate = self.learning_rate(step)
        set_learning_rate(self.state.optimizer, rate)
        seen: list[Seen] = []
        last = False
        while not last:
            asked = time.perf_counter()
            microbatch, samples = next(batches)
            waited += time.perf_counter() - asked
            last = microbatch.last
            with nullcontext() if last else self.engine.no_sync(self.model):
                output = self._forward(self.model, microbatch, samples)
                self.engine.backward(output.loss * scale)
            seen.append(Seen(microbatch, samples, output))
            sums.add(output.loss, output.per_sample, output.sigma)
        if self.config.shard_base:
            sync_gradients(self.state.parameters.values(), world)
        loss_sum, stops, *by_sigma = total(sums.values, world).tolist()
        if not math.isfinite(loss_sum):  # known to every worker, so that all of them end
            raise self._not_finite(step, seen, "loss")
        norm = self._clip()
        if self.state.scaler is None and not math.isfinite(norm):  # a scaler leaves such a step out and scales less
            raise self._not_finite(step, seen, "gradient")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.state.ema is not None and not self.optimizer.step_was_skipped:
            self.state.ema.update(step + 1)
        return StepOutcome(
            loss=loss_sum / self.feed.lanes,
            grad_norm=norm,
            learning_rate=rate,
            waited=waited,
            seconds=time.perf_counter() - began,
            stop=stops > 0,
            sigma_sums=by_sigma[:SIGMA_BUCKETS],
            sigma_counts=by_sigma[SIGMA_BUCKETS:],
        )

    def _metrics(self, done: int, outcome: StepOutcome) -> dict[str, Any]:
        """The line of metrics.jsonl after `done` steps."""
        each = self.feed.samples_per_step
        return {
            "step": done,
            "steps": self.total,
            "epoch": (done - 1) // self.per_epoch,
            "loss": outcome.loss,
            "grad_norm": outcome.grad_norm,
            "learning_rate": outcome.learning_rate,
            "samples": each,
            "samples_seen": done * each,
            "samples_total": self.total * each,
            "workers": self.context.world_size,
            **self.window.numbers(each, self.context.device),
        }

    def _forward(self, model: nn.Module, microbatch: Microbatch, samples: Sequence[dict[str, Any]]) -> LossOutput:
        if self.config.shard_base:
            check_equal_work(samples, self.context.world_size, self.context.device)
        # Dropout and whatever else of a model draws from the global generator is keyed like the rest: by position.
        seed = generator("model", self.config.seed, microbatch.step, microbatch.lane).initial_seed()
        torch.manual_seed(seed)
        with self.engine.autocast():
            return cast(LossOutput, model(samples, microbatch.keys))

    def _probe(self) -> list[str]:
        """Find the parameters that no gradient reaches, on the run's first microbatch: the same on every worker."""
        first = next(self.feed.microbatches(0, 1, 0, 1))
        output = self._forward(self.module, first, self.feed.fetch(first))
        unused = fix_unused(self.module, output.loss)
        if unused:
            named = ", ".join(unused[:4])
            self._say(f"{len(unused)} of the trained parameters get no gradient and stay as they are: {named}")
        return unused

    def _clip(self) -> float:
        limit = self.config.max_grad_norm or float("inf")  # inf changes nothing and gives the norm
        norm = self.engine.clip_grad_norm_(self.state.parameters.values(), limit)
        return float(norm) if norm is not None else float("nan")

    def _footprint(self) -> memory.Footprint:
        states = 2 if self.config.customized_optimizer is None else 1
        pipe = self.module.pipe
        denoising = [getattr(pipe, name) for name in pipe.in_iteration_models]
        return memory.Footprint.of(self.module, denoising, states, self.context.device)

    def _due(self, done: int, every: int | None) -> bool:
        return done % every == 0 if every else self._save_due(done)

    def _save_due(self, done: int) -> bool:
        every = self.config.save_steps or self.per_epoch
        return done == self.total or done % every == 0

    def _save(self, done: int, *, export: bool) -> None:
        """LoRA file first, then the checkpoint: a kill in between costs the steps since the last one, never a file."""
        if not all(bool(torch.isfinite(p.detach()).all()) for p in self.state.parameters.values()):
            raise TrainingError(
                f"step {done}: the trained weights are not finite; no file was written of them: lower --learning_rate"
                + self._restart()
            )
        self.said.sum(self.context.world_size)
        if not self.is_main:
            return
        if export:
            by_epoch = self.config.save_steps is None and done % self.per_epoch == 0
            name = f"epoch-{done // self.per_epoch - 1}" if by_epoch else f"step-{done}"
            with evaluated(self.state.optimizer):
                self.files += self._export(name)
            if self.state.ema is not None:
                with self.state.ema.applied():
                    self.files += self._export(f"{name}.ema")
        position = {"lanes": self.feed.lanes, "epoch": done // self.per_epoch, "unused": self.unused, **self._counts()}
        position["warnings"] = self.said.all.rows()
        checkpoint = self.state.checkpoint(done, self.identity, position)
        self.saved = save_checkpoint(self.setup.output_path, checkpoint, self.config.keep_checkpoints)

    def _counts(self) -> dict[str, Any]:
        """What a message says of two runs that differ."""
        config = self.config
        return {"samples": len(self.data.sample_ids), "num_epochs": config.num_epochs, "max_steps": config.max_steps}

    def _export(self, name: str) -> list[str]:
        return export_trained(
            self.module.pipe, self.trained, self.setup.output_path, name, layout=self.config.lora_format
        )

    def _tell_of_data(self) -> None:
        """Say what happened to the data, over all workers; what was said before is not said again."""
        self.said.sum(self.context.world_size)
        for line in self.said.untold() if self.is_main else ():
            logger.warning("%s", line)

    def _say(self, text: str) -> None:
        if self.is_main:
            logger.info(text)
