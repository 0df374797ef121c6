"""Sample images while a run trains: by an actor with a model of its own, or by the workers between two steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.storage import is_remote, join, write_bytes_atomic
from ray_diffsynth.training.build import build_module
from ray_diffsynth.training.distributed import all_gather
from ray_diffsynth.training.module import DiffusionTrainingModule
from ray_diffsynth.training.report.drawing import SampleDrawer, run_frozen_units
from ray_diffsynth.training.report.sample_grids import SAMPLES_FOLDER, GridInfo, encode_grid, grid_name, make_grid
from ray_diffsynth.training.report.sample_prompts import SamplePrompt
from ray_diffsynth.training.runtime import WorkerRuntime

logger = logging.getLogger(__name__)


class ImageSampler:
    """Draws grids with a model of its own that has the run's LoRA; `draw` takes other weights each time.

    samples: the prompts of a grid, which are encoded once. device: where the model lies and computes.
    """

    def __init__(self, plan: TrainPlan, samples: Sequence[SamplePrompt], device: torch.device) -> None:
        self.plan, self.samples = plan.on_this_machine(), samples
        encoded = run_frozen_units(self.plan, samples, range(len(samples)), device)
        self.module, _ = build_module(self.plan, device)
        self._drawing = SampleDrawer(self.plan, self.module, samples, encoded)
        self._parameters = dict(self.module.named_parameters())

    @torch.no_grad()
    def draw(self, step: int, weights: Mapping[str, torch.Tensor]) -> str:
        """Write the grid of one image a prompt after `step` steps; the same noise each time. Returns its path.

        Without weights, before any are given: what the training starts from, the base model or the LoRAs it was given.
        """
        for name, value in weights.items():
            self._parameters[name].copy_(value)
        return write_grid(self.plan, self.samples, step, [self._drawing.draw(n) for n in range(len(self.samples))])


class TrainingImageSampler:
    """Draws grids with the model that trains, between two steps: each worker its part of the prompts.

    For clusters that have no GPU left for an actor.

    The prompts are encoded when this is made, before the model is loaded; the model that trains draws, and is left as
    it was: a run with images trains what the run without them does. A failure ends only the images, except where
    the workers share a model out (--shard_base) and would wait for each other.
    """

    def __init__(self, plan: TrainPlan, samples: Sequence[SamplePrompt], runtime: WorkerRuntime) -> None:
        self.plan, self.samples, self.runtime = plan, samples, runtime
        rank, world = runtime.world_rank, runtime.world_size
        # As many images on each worker: a sharded model gathers its weights in all of them at once.
        rounds = range(rank, -(-len(samples) // world) * world, world)
        self._numbers = [number % len(samples) for number in rounds if plan.config.shard_base or number < len(samples)]
        self._error: str | None = None
        self._ended = False
        self._encoded: Any = {}
        self._attempt(self._encode)

    def _encode(self) -> None:
        self._encoded = run_frozen_units(self.plan, self.samples, self._numbers, self.runtime.device)

    def draw(self, step: int, module: DiffusionTrainingModule) -> None:
        """Write the grid after `step` steps; all workers must call it."""
        if self._ended:
            return
        images: list[tuple[int, bytes]] = []
        self._attempt(lambda: images.extend(self._draw(module)))
        found = all_gather([(self._error, images)], self.runtime.world_size)
        errors = [error for error, _ in found if error is not None]
        self._ended = bool(errors)
        if self.runtime.world_rank != 0:
            return
        if errors:
            logger.warning("the sample images ended early: step %d: %s", step, errors[0])
            return
        by_number = {number: data for _, part in found for number, data in part}
        sheets = [Image.open(BytesIO(by_number[number])) for number in range(len(self.samples))]
        write_grid(self.plan, self.samples, step, sheets)

    def _draw(self, module: DiffusionTrainingModule) -> list[tuple[int, bytes]]:
        drawing = SampleDrawer(self.plan, module, self.samples, self._encoded)
        try:
            return [(number, _png(drawing.draw(number))) for number in self._numbers]
        finally:
            drawing.release()

    def _attempt(self, work: Any) -> None:
        if self._error is not None:
            return
        try:
            work()
        except Exception as error:
            if self.plan.config.shard_base and self.runtime.world_size > 1:
                raise
            # As text: the error itself holds its frames, and with them the tensors on the device.
            self._error = f"{type(error).__name__}: {error}"
        if self._error is not None and self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def write_grid(plan: TrainPlan, samples: Sequence[SamplePrompt], step: int, images: Sequence[Image.Image]) -> str:
    """Write the grid of `step`, as PNG and in TensorBoard; returns its path."""
    sheet = make_grid(images)
    path = join(plan.output_path, SAMPLES_FOLDER, grid_name(step))
    write_bytes_atomic(path, encode_grid(sheet, GridInfo.of(plan.config, samples, step)))
    if "tensorboard" in plan.config.trackers and not is_remote(plan.output_path):
        _to_tensorboard(plan.output_path, step, sheet)
    return path


def _to_tensorboard(output_path: str, step: int, sheet: Image.Image) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(join(output_path, "tensorboard"), filename_suffix=".samples")
    writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
    writer.close()


def _png(image: Image.Image) -> bytes:
    data = BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()
