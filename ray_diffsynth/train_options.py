"""Options of training beyond those that name the data, the model and the run: the second half of ``TrainConfig``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from ray_diffsynth.errors import ConfigError, did_you_mean

TRACKERS = ("tensorboard", "csv", "wandb", "mlflow", "none")

RANGES: dict[str, tuple[float, float]] = {
    "adam_epsilon": (1e-30, 1.0),
    "logit_mean": (-20.0, 20.0),
    "logit_std": (0.0, 20.0),
    "mode_scale": (-1.0, 2 / (math.pi - 2)),
    "timestep_shift": (1e-3, 1e3),
}
"""Least and most of numbers beyond which a training computes nothing: without an epsilon AdamW divides 0 by 0 (a LoRA
starts with gradients of 0), a shift of 0 does likewise, a logit of hundreds overflows, and SD3's mode
(arXiv:2403.03206, section 3.1) leaves the schedule."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Fields that ``TrainConfig`` has too."""

    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Course of the learning rate, as in diffusers; those that fall end at the run's last step."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    customized_optimizer: str | None = None
    """Optimizer by import path, module:Class, e.g. torch.optim:RMSprop, or of a module in the working folder; AdamW
    when not given."""
    optimizer_arguments: dict[str, Any] | None = None
    """Further arguments of customized_optimizer, e.g. {"momentum": 0.9}."""
    adam_beta1: float | None = None
    """AdamW's decay of the mean; 0.9 when not given."""
    adam_beta2: float | None = None
    """AdamW's decay of the variance; 0.999 when not given."""
    adam_epsilon: float | None = None
    """AdamW's epsilon; 1e-8 when not given."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, e.g. 0.999, written beside them as *.ema.safetensors; 0 is none."""
    timestep_sampling: Literal["uniform", "logit_normal", "mode", "shift"] = "uniform"
    """How timesteps are drawn: uniform over the family's schedule, SD3's logit_normal, mode, shift by resolution."""
    logit_mean: float | None = None
    """Mean of logit_normal, -20 to 20; below 0 draws more of the noisy end; 0 when not given."""
    logit_std: float | None = None
    """Standard deviation of logit_normal, up to 20; 1 when not given."""
    mode_scale: float | None = None
    """Scale of mode, -1 to 1.75; 1.29 when not given."""
    timestep_shift: float | None = None
    """Factor of shift, 0.001 to 1000; by the number of image tokens, as the family's sampling, when not given."""
    caption_dropout: float = 0.0
    """Part of the samples that are trained with the empty caption, drawn anew in each epoch."""

    lora_dropout: float = 0.0
    """Dropout before the LoRA."""
    use_rslora: bool = False
    """Scale the LoRA by lora_alpha / sqrt(lora_rank) instead of lora_alpha / lora_rank (rsLoRA)."""
    use_dora: bool = False
    """Train the magnitudes of the weights too (DoRA)."""
    lora_format: Literal["family", "diffusers"] = "family"
    """Keys of the LoRA file: those that diffusers, ComfyUI and DiffSynth-Studio all load, or diffusers' own names,
    which a DoRA always has."""

    gradient_checkpointing_every: int | None = None
    """Of the model's blocks, every how many-th is computed again with use_gradient_checkpointing; 1 when not given."""
    fp8_base: bool = False
    """Keep the frozen model's linear layers in 8 bits, with a scale for each output: half the memory of bfloat16. What
    diffusers' layerwise casting leaves out of the family's model keeps its precision; the log says what."""
    shard_base: bool = False
    """Share the frozen base out among the workers, block by block (FSDP2), for models that one GPU cannot hold."""

    validation_samples: int = 0
    """Samples that are held out, never trained on, for the validation loss (fixed noise and timesteps)."""
    validation_steps: int | None = None
    """Steps between two validation losses; at each checkpoint when not given."""
    validation_prompts: str | None = None
    """Prompts with | between them, a text file with a prompt a line, or a csv or jsonl file as jobs/generate.py takes,
    with the pictures that a family needs: drawn during training, in its size, first by the base model."""
    sample_steps: int | None = None
    """Steps between two grids of sample pictures; at each checkpoint when not given."""
    sample_inference_steps: int | None = None
    """Inference steps of the sample pictures; the family's default when not given."""
    sample_resources: dict[str, float] | None = None
    """Ray resources of the actor that makes the sample pictures; a GPU when the workers leave one, else the workers
    draw between steps."""
    log_with: str = "tensorboard"
    """Comma-separated: tensorboard, csv, wandb, mlflow; none for metrics.jsonl alone."""

    shard_cache: str | None = None
    """Local folder in which each node keeps the files of a remote cache that it has read."""
    shard_cache_gb: float | None = None
    """Size limit of shard_cache in GB; what was used the longest ago goes first; 100 when not given."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """``log_with`` as names, without ``none``."""
        names = self._tracker_names()
        return tuple(dict.fromkeys(name for name in names if name != "none"))

    def _tracker_names(self) -> list[str]:
        return [name.strip() for name in self.log_with.split(",") if name.strip()]

    def check_options(self) -> None:
        """Raise ConfigError for a value that cannot work."""
        self._check_ranges()
        if self.trackers and "none" in self._tracker_names():
            raise ConfigError(f"log_with={self.log_with!r}: none stands beside others; leave it or them out")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ConfigError(f"log_with={self.log_with!r}: {name!r} is not known; {did_you_mean(name, TRACKERS)}")
        if not 0 <= self.caption_dropout <= 1:
            raise ConfigError(f"caption_dropout={self.caption_dropout} is no part of the samples; use 0 to 1")
        if self.customized_optimizer and not re.fullmatch(r"[\w.]+[:.]\w+", self.customized_optimizer):
            raise ConfigError(
                f"customized_optimizer={self.customized_optimizer!r} is no import path; write module:Class, "
                "e.g. torch.optim:RMSprop"
            )
        if "lr" in (self.optimizer_arguments or {}):
            raise ConfigError("optimizer_arguments names lr, which the schedule sets in each step; use learning_rate")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            object.__setattr__(self, "lr_scheduler", "constant_with_warmup")
        if self.lr_scheduler == "constant_with_warmup" and not self.lr_warmup_steps:
            raise ConfigError("lr_scheduler=constant_with_warmup needs lr_warmup_steps; give that too, or use constant")
        if self.fp8_base and self.shard_base:
            raise ConfigError("fp8_base and shard_base do not work together; choose one")
        if self.fp8_base and self.use_dora:
            raise ConfigError("fp8_base and use_dora do not work together: DoRA needs the weights themselves")

    def _check_ranges(self) -> None:
        for name in ("adam_beta1", "adam_beta2", "ema_decay", "lora_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name}={value} is out of range; use at least 0 and less than 1")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{name}={value} is out of range; use {least:g} to {most:g}")

    def positive_options(self) -> dict[str, float]:
        """The least value of each number here."""
        one = ("gradient_checkpointing_every", "validation_steps", "sample_steps", "sample_inference_steps")
        zero = ("lr_warmup_steps", "validation_samples")
        return {**dict.fromkeys(one, 1), **dict.fromkeys(zero, 0), "shard_cache_gb": 0}


def worker_range(num_workers: int | str) -> tuple[int, int]:
    """``2`` -> (2, 2); ``"1..8"`` -> (1, 8); 0, chosen by the machine, -> (0, 0). Raises ConfigError."""
    text = str(num_workers).strip()
    if text.isdigit():
        return int(text), int(text)
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"num_workers={num_workers!r} is no number of workers; write 2, or 1..8 for an elastic run")
    return int(found[1]), int(found[2])
