"""The training loop, without Ray: one optimizer step is one microbatch from every lane of the plan."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.data.storage import write_bytes_atomic
from ray_diffsynth.diffusion.randomness import generator
from ray_diffsynth.tasks import LossOutput
from ray_diffsynth.training.checkpoint import check_identity, newest_checkpoint, save_checkpoint
from ray_diffsynth.training.context import Context
from ray_diffsynth.training.engine import accelerator, distribute, same_everywhere, total
from ray_diffsynth.training.export import Trained, describe, export_trained
from ray_diffsynth.training.feed import Feed, Microbatch
from ray_diffsynth.training.metrics import MetricsLog, output_file
from ray_diffsynth.training.module import DiffusionTrainingModule, fix_unused, freeze
from ray_diffsynth.training.optim import constant, make_optimizer, set_learning_rate
from ray_diffsynth.training.setup import Setup, TrainingError
from ray_diffsynth.training.state import TrainingState

logger = logging.getLogger(__name__)

Batches = Iterator[tuple[Microbatch, Sequence[dict[str, Any]]]]


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    steps: optimizer steps of the whole run so far; total: planned; started_at: where this attempt began. samples: how
    many there are; padded: entries per epoch that fill batches up. loss: of the last step. files: exported this time.
    """

    steps: int
    total: int
    started_at: int
    steps_per_epoch: int
    samples: int
    padded: int
    loss: float | None
    seconds: float
    files: list[str] = field(default_factory=list)
    checkpoint: str | None = None
    unused: int = 0

    @property
    def finished(self) -> bool:
        return self.steps == self.total

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(config: TrainConfig, context: Context) -> TrainResult:
    """Train from the newest checkpoint in `config.output_path` (or from the start) to the end, or until asked to stop.

    Raises UserErrors: what `Setup.of` checks, a checkpoint of another run, a loss that is not finite, a damaged cache.
    """
    setup = Setup.of(config)
    with accelerator(context, config.dtype) as engine:
        return _Run(setup, context, engine).run()


class _Run:
    """One attempt: from a checkpoint, or the start, onwards."""

    def __init__(self, setup: Setup, context: Context, engine: Accelerator) -> None:
        self.setup, self.context, self.engine = setup, context, engine
        self.config = config = setup.config
        self.data = setup.open_data()
        self.identity = setup.identity(self.data)
        checkpoint = newest_checkpoint(setup.output_path)
        self.start = checkpoint.step if checkpoint else 0
        if not same_everywhere(self.start, context.world_size, context.device):
            raise TrainingError(
                f"the workers see different checkpoints in {setup.output_path}; all nodes must share --output_path"
            )
        # Fixed when the run starts, so that another number of workers trains the same batches.
        lanes = context.world_size * config.gradient_accumulation_steps
        if checkpoint:
            check_identity(checkpoint.identity, self.identity, f"{setup.output_path}/checkpoints/{checkpoint.name}")
            lanes = checkpoint.position["lanes"]
        self.feed = Feed(self.data, config.seed, config.batch_size, lanes, config.dataset_repeat)
        self.per_epoch = self.feed.steps_per_epoch
        every = config.num_epochs * self.per_epoch
        self.total = every if config.max_steps is None else min(every, config.max_steps)
        self.loss: float | None = None
        self.files: list[str] = []
        self.saved: str | None = None

        self.module: DiffusionTrainingModule
        self.trained: Trained
        self.module, self.trained = setup.build(context.device)
        self.unused: list[str] = checkpoint.position["unused"] if checkpoint else self._probe()
        freeze(self.module, self.unused)
        parameters = self.module.trainable()
        if not parameters:
            raise TrainingError("no trainable parameter reaches the loss; choose other lora_target_modules")
        self.learning_rate = constant(config.learning_rate)
        optimizer = make_optimizer(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.state = TrainingState(parameters, optimizer, getattr(engine, "scaler", None))
        if checkpoint:
            self.state.restore(checkpoint)
        self.optimizer: Any = engine.prepare_optimizer(optimizer)
        self.model: nn.Module = distribute(engine, self.module, context.world_size)
        self._say(describe(self.trained, list(parameters.values())))
        if checkpoint:
            self._say(f"going on from step {self.start} of {self.total}, saved in {setup.output_path}/checkpoints")

    @property
    def is_main(self) -> bool:
        return self.context.world_rank == 0

    def run(self) -> TrainResult:
        started = time.monotonic()
        log = MetricsLog(self.setup.output_path, after=self.start) if self.is_main else None
        done = self.start
        rank, world = self.context.world_rank, self.context.world_size
        with closing(self.feed.read(self.start, self.total, rank, world, self.config.dataset_num_workers)) as batches:
            while done < self.total:
                metrics, stop = self._step(done, batches)
                done += 1
                if log is not None and (done % self.config.log_every == 0 or done == self.total):
                    log.write(metrics)
                    self.context.report(metrics)
                if self._save_due(done) or stop:
                    self._save(done, export=self._save_due(done))
                    if log is not None:
                        log.flush()
                if stop:
                    self._say(f"asked to stop: saved step {done}, run the same command again to go on")
                    break
        return TrainResult(
            steps=done,
            total=self.total,
            started_at=self.start,
            steps_per_epoch=self.per_epoch,
            samples=len(self.data.sample_ids),
            padded=self.per_epoch * self.feed.samples_per_step - self.config.dataset_repeat * len(self.data.sample_ids),
            loss=self.loss,
            seconds=time.monotonic() - started,
            files=self.files,
            checkpoint=self.saved,
            unused=len(self.unused),
        )

    def _step(self, step: int, batches: Batches) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its metrics and whether some worker was asked to stop."""
        world = self.context.world_size
        began, waited = time.perf_counter(), 0.0
        # DDP divides by the number of workers; what is wanted is the mean over the lanes.
        scale = world / self.feed.lanes
        # [sum of the lanes' losses, workers that were asked to stop]
        sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        sums[1] = self.context.stop_requested()
        set_learning_rate(self.state.optimizer, self.learning_rate(step))
        outputs: list[tuple[Microbatch, LossOutput]] = []
        last = False
        while not last:
            asked = time.perf_counter()
            microbatch, samples = next(batches)
            waited += time.perf_counter() - asked
            last = microbatch.last
            with nullcontext() if last else self.engine.no_sync(self.model):
                output = self._forward(self.model, microbatch, samples)
                self.engine.backward(output.loss * scale)
            outputs.append((microbatch, output))
            sums[0] += output.loss.detach()
        loss_sum, stops = total(sums, world).tolist()
        if not math.isfinite(loss_sum):  # known to every worker, so that all of them end
            raise TrainingError(self._not_finite(step, outputs))
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss_sum / self.feed.lanes
        seconds = time.perf_counter() - began
        done, each = step + 1, self.feed.samples_per_step
        return {
            "step": done,
            "steps": self.total,
            "epoch": step // self.per_epoch,
            "loss": self.loss,
            "grad_norm": norm,
            "learning_rate": self.learning_rate(step),
            "samples": each,
            "samples_seen": done * each,
            "samples_total": self.total * each,
            "samples_per_second": each / seconds,
            "data_wait": waited / seconds,
        }, stops > 0

    def _forward(self, model: nn.Module, microbatch: Microbatch, samples: Sequence[dict[str, Any]]) -> LossOutput:
        # Dropout and whatever else of a model draws from the global generator is keyed like the rest: by position.
        seed = generator("model", self.config.seed, microbatch.step, microbatch.lane).initial_seed()
        torch.manual_seed(seed)
        with self.engine.autocast():
            return cast(LossOutput, model(samples, microbatch.keys))

    def _probe(self) -> list[str]:
        """Find the parameters that no gradient reaches, on the run's first microbatch: the same on every worker."""
        first = next(self.feed.microbatches(0, 1, 0, 1))
        output = self._forward(self.module, first, self.data.fetch(first.rows))
        unused = fix_unused(self.module, output.loss)
        if unused:
            named = ", ".join(unused[:4])
            self._say(f"{len(unused)} of the trained parameters get no gradient and stay as they are: {named}")
        return unused

    def _clip(self) -> float:
        limit = self.config.max_grad_norm or float("inf")  # inf changes nothing and gives the norm
        norm = self.engine.clip_grad_norm_(self.state.parameters.values(), limit)
        return float(norm) if norm is not None else float("nan")

    def _not_finite(self, step: int, outputs: Sequence[tuple[Microbatch, LossOutput]]) -> str:
        """Write down the samples of this worker whose loss is not finite; returns the message."""
        samples = [
            {"sample_id": key.sample_id, "epoch": key.epoch, "repeat": key.repeat, "loss": str(loss), "sigma": sigma}
            for microbatch, output in outputs
            for key, loss, sigma in zip(microbatch.keys, output.per_sample.tolist(), output.sigma.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        if not samples:
            return f"step {step + 1}: the loss of another worker is not finite; see its message"
        path = output_file(self.setup.output_path, f"nonfinite-step-{step + 1}.json")
        write_bytes_atomic(path, json.dumps({"step": step + 1, "samples": samples}, indent=1).encode())
        ids = ", ".join(str(sample["sample_id"]) for sample in samples)
        return (
            f"step {step + 1}: the loss is not finite for {ids} (see {path}); lower --learning_rate, use "
            "--dtype bfloat16 or float32, or look at these samples"
        )

    def _save_due(self, done: int) -> bool:
        every = self.config.save_steps or self.per_epoch
        return done == self.total or done % every == 0

    def _save(self, done: int, *, export: bool) -> None:
        """LoRA file first, then the checkpoint: a kill in between costs the steps since the last one, never a file."""
        if not self.is_main:
            return
        if export:
            by_epoch = self.config.save_steps is None and done % self.per_epoch == 0
            name = f"epoch-{done // self.per_epoch - 1}" if by_epoch else f"step-{done}"
            pipe = self.module.pipe
            self.files += export_trained(pipe, self.trained, self.setup.output_path, name)
        position = {"lanes": self.feed.lanes, "epoch": done // self.per_epoch, "unused": self.unused}
        checkpoint = self.state.checkpoint(done, self.identity, position)
        self.saved = save_checkpoint(self.setup.output_path, checkpoint, self.config.keep_checkpoints)

    def _say(self, text: str) -> None:
        if self.is_main:
            logger.info(text)
