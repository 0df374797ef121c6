"""Drawing with a model that trains: prompts encoded once, as stage 1 would; then images with the trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from ray_diffsynth.data.media import load_image
from ray_diffsynth.diffusion.transfer import moved
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.graph import model_root
from ray_diffsynth.pipelines.core.lora_keys import fuse_model_lora
from ray_diffsynth.pipelines.core.on_demand import on_demand, release_parts
from ray_diffsynth.pipelines.core.unit import PipelineUnit
from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.training.module import DiffusionTrainingModule
from ray_diffsynth.training.report.sample_prompts import SamplePrompt

UnitOutputs: TypeAlias = dict[tuple[int, int], list[Any]]
"""(number of the prompt, of the unit) -> what its calls returned, on the CPU."""


class _EncodedError(Exception):
    """The units of a prompt have run; what follows in `__call__` needs the transformer."""


class _End(PipelineUnit):
    def __init__(self) -> None:
        super().__init__(take_over=True)

    def process(self, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        raise _EncodedError


@torch.no_grad()
def run_frozen_units(
    plan: TrainPlan, samples: Sequence[SamplePrompt], numbers: Iterable[int], device: torch.device
) -> UnitOutputs:
    """What the units that run frozen models return for these samples; the models are loaded for it, and let go.

    Call it before the model that is trained takes the memory.
    """
    dtype: torch.dtype = getattr(torch, plan.config.dtype)
    pipe = on_demand(plan.pipeline, plan.source, device=device, torch_dtype=dtype)
    trained = map(model_root, plan.config.trained)
    preset = plan.config.preset_lora_model
    if plan.config.preset_lora_path and preset and model_root(preset) not in {*pipe.in_iteration_models, *trained}:
        fuse_model_lora(pipe, preset, plan.config.preset_lora_path)
    encoded: UnitOutputs = {}
    current = 0

    def record(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            encoded.setdefault((current, number), []).append(moved(result, torch.device("cpu")))
            return result

        return call

    _replace_calls(pipe, plan, record)
    pipe.units = [*plan.split.stages(pipe).stage1, _End()]
    try:
        for current in dict.fromkeys(numbers):  # `record` reads it
            with suppress(_EncodedError):
                call_pipeline(pipe, samples[current])
    finally:
        release_parts(pipe)
    return encoded


class SampleDrawer:
    """Draws with the models of `module`; others, such as the VAE, are read when they are needed.

    It has a pipeline of its own: the schedule, units and settings of the one that trains stay as they are.

    Args:
        encoded: see `run_frozen_units`; of the samples that will be asked for.
    """

    def __init__(
        self, plan: TrainPlan, module: DiffusionTrainingModule, samples: Sequence[SamplePrompt], encoded: UnitOutputs
    ) -> None:
        self.module, self.samples, self._encoded = module, samples, encoded
        trained = module.pipe
        self._dtype = trained.torch_dtype
        self.pipe = on_demand(plan.pipeline, plan.source, device=trained.device, torch_dtype=self._dtype)
        for name in (*trained.parts, *trained.companions):
            if (part := getattr(trained, name, None)) is not None:
                setattr(self.pipe, name, part)
        self._current = 0
        self._calls: dict[int, int] = {}
        _replace_calls(self.pipe, plan, self._replay)
        # What training computes under autocast, with weights in fp32, and nothing else: no encoder, no decoder.
        for unit in plan.split.stages(self.pipe).stage2:
            _wrap_calls(unit, self._under_autocast)
        self.pipe.model_fn = self._under_autocast(self.pipe.model_fn)

    @torch.no_grad()
    def draw(self, number: int) -> Image.Image:
        """The image of a sample (of a video its middle frame); moves no random generator, leaves every mode."""
        self._current, self._calls = number, {}
        devices = [self.pipe.device] if self.pipe.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), _eval_mode(self.module):
            return _to_image(call_pipeline(self.pipe, self.samples[number]))

    def release(self) -> None:
        """Let go of what was read beside the models of the module."""
        release_parts(self.pipe)

    def _replay(self, number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            at = self._calls.get(number, 0)
            self._calls[number] = at + 1
            return moved(self._encoded[self._current, number][at], self.pipe.device)

        return call

    def _under_autocast(self, function: Callable[..., Any]) -> Callable[..., Any]:
        kind, on = self.pipe.device.type, self._dtype is not torch.float32

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(kind, self._dtype if on else None, enabled=on):
                return function(*args, **kwargs)

        return call


def call_pipeline(pipe: Any, sample: SamplePrompt) -> Any:
    """What `__call__` makes of a sample."""
    images = {
        name: load_image(paths) if isinstance(paths, str) else [load_image(path) for path in paths]
        for name, paths in sample.images
    }
    return pipe(sample.prompt, seed=sample.seed, **dict(sample.arguments), **images)


def _replace_calls(
    pipe: BasePipeline, plan: TrainPlan, replace: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Replace what the runner calls of each unit that runs frozen models alone."""
    stage1 = plan.split.stages(pipe).stage1
    for number, unit in enumerate(pipe.units):
        if unit in stage1 and unit.onload_model_names:
            _wrap_calls(unit, partial(replace, number))


def _wrap_calls(unit: PipelineUnit, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    name = "process" if unit.take_over else "process_batch"  # what the runner calls
    setattr(unit, name, wrap(getattr(unit, name)))


@contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def _to_image(made: Any) -> Image.Image:
    """An image; of a video its middle frame."""
    if isinstance(made, Image.Image):
        return made.convert("RGB")
    frame = made[len(made) // 2]
    return frame.convert("RGB") if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame))
