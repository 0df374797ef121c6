"""Sample pictures while a run trains: a model of its own that takes the trained weights of a step and paints."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.data.storage import is_remote, join, write_bytes_atomic
from ray_diffsynth.pipelines.registry import get_pipeline_class
from ray_diffsynth.training.setup import Setup, TrainingError

SAMPLES_FOLDER = "samples"
"""Where the grids lie, as step-<number>.png."""


def read_prompts(given: str) -> list[str]:
    """The lines of the file `given`, if it is one, else the prompts between its |. Raises TrainingError."""
    path = Path(given)
    text = path.read_text(encoding="utf-8").splitlines() if path.is_file() else given.split("|")
    prompts = [line.strip() for line in text if line.strip()]
    if not prompts:
        raise TrainingError(f"--validation_prompts {given!r} has no prompt; write one a line, or with | between them")
    return prompts


def check_models(setup: Setup) -> None:
    """Raise TrainingError if a model that sampling needs is not in the model folder: stage 2 may do without it."""
    parts = _parts(setup)
    absent = [name for name, subfolder in parts.items() if not setup.source.has(subfolder)]
    if absent:
        raise TrainingError(
            f"--validation_prompts needs the whole model, but {', '.join(absent)} is not given; name the whole folder "
            "by --model, or leave --validation_prompts out"
        )


def _parts(setup: Setup) -> dict[str, str]:
    return {name: part.subfolder for name, part in get_pipeline_class(setup.family).parts.items()}


class Sampler:
    """The whole pipeline with the run's LoRA, and the prompts. Made once; `draw` takes other weights each time."""

    def __init__(self, config: TrainConfig, prompts: Sequence[str], device: torch.device) -> None:
        setup = Setup.of(config)
        self.config, self.prompts = config, list(prompts)
        self.output_path = setup.output_path
        self.module, _ = replace(setup, models=tuple(_parts(setup))).build(device)
        self.module.eval()
        self._parameters = dict(self.module.named_parameters())

    @torch.no_grad()
    def draw(self, step: int, weights: Mapping[str, torch.Tensor]) -> str:
        """Write the grid of one picture a prompt after `step` steps; the same noise each time. Returns its path."""
        for name, value in weights.items():
            self._parameters[name].copy_(value)
        pipe: Any = self.module.pipe
        options: dict[str, Any] = {"height": self.config.height, "width": self.config.width}
        if self.config.sample_inference_steps:
            options["num_inference_steps"] = self.config.sample_inference_steps
        seed, size = self.config.seed, {name: value for name, value in options.items() if value}
        pictures = [_picture(pipe(prompt, seed=seed + n, **size)) for n, prompt in enumerate(self.prompts)]
        sheet = grid(pictures)
        data = io.BytesIO()
        sheet.save(data, format="PNG")
        path = join(self.output_path, SAMPLES_FOLDER, f"step-{step:08d}.png")
        write_bytes_atomic(path, data.getvalue())
        if "tensorboard" in self.config.trackers and not is_remote(self.output_path):
            self._to_tensorboard(step, sheet)
        return path

    def _to_tensorboard(self, step: int, sheet: Image.Image) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(join(self.output_path, "tensorboard"), filename_suffix=".samples")
        writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        writer.close()


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures in rows, about as many rows as columns, each in its place also when sizes differ."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    return sheet


def _picture(made: Any) -> Image.Image:
    """A picture; of a video its middle frame."""
    if isinstance(made, Image.Image):
        return made.convert("RGB")
    frame = made[len(made) // 2]
    return frame.convert("RGB") if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame))
