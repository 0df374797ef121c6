"""Sample pictures while a run trains: a model of its own that takes the trained weights of a step and paints."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.data.storage import is_remote, join, write_bytes_atomic
from ray_diffsynth.data.text import TextError, decode_text
from ray_diffsynth.pipelines.registry import get_pipeline_class
from ray_diffsynth.training.sample_grids import SAMPLES_FOLDER, Shown, encode, grid, grid_name
from ray_diffsynth.training.setup import Setup, TrainingError


def read_prompts(given: str) -> list[str]:
    """The lines of the file `given`, if it is one, else the prompts between its |. Raises TrainingError."""
    # os.path: unlike pathlib it takes a prompt that is too long for a file's name.
    if os.path.isfile(given):
        text = _read(given).splitlines()
    elif re.fullmatch(r"[^|]*\.(txt|csv|jsonl?|md)", given.strip()):
        raise TrainingError(
            f"--validation_prompts {given} does not exist; give a text file with a prompt a line, or the prompts "
            "themselves with | between them"
        )
    else:
        text = given.split("|")
    prompts = [line.strip() for line in text if line.strip()]
    if not prompts:
        raise TrainingError(f"--validation_prompts {given!r} has no prompt; write one a line, or with | between them")
    return prompts


def _read(path: str) -> str:
    try:
        return decode_text(path, Path(path).read_bytes())
    except TextError as error:
        raise TrainingError(f"--validation_prompts {path} {error}") from error
    except OSError as error:
        raise TrainingError(f"--validation_prompts {path} cannot be read: {error}") from error


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
        """Write the grid of one picture a prompt after `step` steps; the same noise each time. Returns its path.

        Without weights, before any are given: what the training starts from, the base model or the LoRAs it was given.
        """
        for name, value in weights.items():
            self._parameters[name].copy_(value)
        pipe: Any = self.module.pipe
        options: dict[str, Any] = {"height": self.config.height, "width": self.config.width}
        if self.config.sample_inference_steps:
            options["num_inference_steps"] = self.config.sample_inference_steps
        seed, size = self.config.seed, {name: value for name, value in options.items() if value}
        kind, dtype = pipe.device.type, pipe.torch_dtype
        with torch.autocast(kind, dtype, enabled=dtype is not torch.float32):  # what is trained is in fp32
            pictures = [_picture(pipe(prompt, seed=seed + n, **size)) for n, prompt in enumerate(self.prompts)]
        sheet = grid(pictures)
        path = join(self.output_path, SAMPLES_FOLDER, grid_name(step))
        write_bytes_atomic(path, encode(sheet, Shown.of(self.config, self.prompts, step)))
        if "tensorboard" in self.config.trackers and not is_remote(self.output_path):
            self._to_tensorboard(step, sheet)
        return path

    def _to_tensorboard(self, step: int, sheet: Image.Image) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(join(self.output_path, "tensorboard"), filename_suffix=".samples")
        writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        writer.close()


def _picture(made: Any) -> Image.Image:
    """A picture; of a video its middle frame."""
    if isinstance(made, Image.Image):
        return made.convert("RGB")
    frame = made[len(made) // 2]
    return frame.convert("RGB") if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame))
