"""The configuration of jobs/generate.py."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from ray_diffsynth.config.common import JobConfig, JobName
from ray_diffsynth.config.options import Component, option, split_names
from ray_diffsynth.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PromptConfig(Component):
    """What is drawn."""

    section = "prompts"
    title = "Generating"

    prompt: str | None = None
    """One prompt; for many use prompt_path."""
    prompt_path: str | None = None
    """File of prompts: .txt with one a line, or csv, json, jsonl, parquet with the column prompt and, if there,
    negative_prompt, seed, height, width, and images that the family takes: edit_image, input_image."""
    negative_prompt: str = ""
    """What guidance leads away from, for rows without their own."""
    seeds: str | None = option(None, many=",")
    """Comma-separated seeds, each for every prompt; when not given, each prompt has seeds of its own from seed on."""
    images_per_prompt: int = option(1, least=1)
    """Images of each prompt, with seeds of their own, when seeds is not given."""

    def check(self) -> None:
        """Raise ConfigError unless prompts are given in one way, and for seeds that are no numbers."""
        if (self.prompt is None) == (self.prompt_path is None):
            raise ConfigError("give either prompt (one) or prompt_path (a file of many)")
        _ = self.seed_list

    @property
    def seed_list(self) -> tuple[int, ...]:
        """``seeds`` as numbers."""
        found = split_names(self.seeds)
        if wrong := [word for word in found if not (word.isascii() and word.isdigit() and int(word) < 2**63)]:
            raise ConfigError(f"seeds={self.seeds!r}: {wrong[0]!r} is not a whole number of at least 0")
        return tuple(int(word) for word in found)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Component):
    """How it is drawn: the family's own values where none are given."""

    section = "sampling"
    title = "Generating"

    num_inference_steps: int | None = option(None, least=1)
    """Sampling steps; the family's number when not given."""
    cfg_scale: float | None = None
    """Classifier-free guidance; 1 turns it off; the family's scale when not given."""
    height: int | None = option(None, least=1, group="Data")
    """Height of the images in pixels; the family's when not given."""
    width: int | None = option(None, least=1, group="Data")
    """Width of the images in pixels; the family's when not given."""
    num_frames: int | None = option(None, least=1, group="Data")
    """Frames of a video; the family's number when not given."""
    fps: float = option(16.0, least=1, group="Data")
    """Frames per second of the videos."""
    rand_device: str = "cpu"
    """Device that draws the noise: cpu gives the same image on every machine."""

    def check(self) -> None:
        """Raise ConfigError for a size or guidance that cannot be."""
        if (self.height is None) != (self.width is None):
            raise ConfigError(f"height={self.height} and width={self.width}: give both, or neither for the family's")
        if self.cfg_scale is not None and not math.isfinite(self.cfg_scale):
            raise ConfigError(f"cfg_scale={self.cfg_scale} is not a number; use e.g. 4, or 1 for no guidance")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.rand_device):
            raise ConfigError(f"rand_device={self.rand_device!r} is no device that draws noise; use cpu or cuda")


@dataclass(frozen=True, kw_only=True)
class AttachedLoraConfig(Component):
    """The LoRA files that images are drawn with."""

    section = "attached_lora"
    title = "Generating"

    lora: str | None = option(None, many=",")
    """Comma-separated LoRA files to generate with."""
    lora_scale: str = option("1", many=",")
    """Comma-separated strengths of the LoRA; each prompt and seed is drawn at each of them, 0 being without it."""

    def check(self) -> None:
        """Raise ConfigError for strengths that are no numbers, or of nothing."""
        if self.lora_scales != (1.0,) and self.lora is None:
            raise ConfigError(f"lora_scale={self.lora_scale} is given without lora; give the LoRA file too, or neither")

    @property
    def lora_scales(self) -> tuple[float, ...]:
        """``lora_scale`` as numbers."""
        try:
            found = tuple(float(word) for word in split_names(self.lora_scale))
        except ValueError as error:
            raise ConfigError(f"lora_scale={self.lora_scale!r}: {error}; write 1, or several as 0,0.5,1") from None
        if not found or not all(math.isfinite(scale) for scale in found):
            raise ConfigError(f"lora_scale={self.lora_scale!r} is not a list of numbers; write 1, or 0,0.5,1")
        return tuple(dict.fromkeys(found))

    @property
    def loras(self) -> tuple[str, ...]:
        """``lora`` as paths."""
        return split_names(self.lora)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AttachedLoraConfig, SamplingConfig, PromptConfig, JobConfig):
    """Images from prompts, to look at a LoRA or as a teacher's data for direct_distill, on a pool of Ray actors."""

    job: ClassVar[JobName] = "generate"
    needed: ClassVar[str] = "--prompt TEXT"

    student_steps: int = option(4, least=1, group="Generating")
    """The column num_inference_steps of metadata.csv: the steps that a student of direct_distill shall need."""
    grid: bool = option(True, group="Generating")
    """Write grid.png: a row for each prompt and seed, a column for each strength of the LoRA; the first 64 images."""
    output_path: str = "./pictures"
    """Folder or URL of the result: pictures/, metadata.csv, grid.png and report.html."""
    seed: int = option(0, least=0)
    """Seed of the first image; those after it have the following numbers."""
    num_workers: int = option(0, least=0)
    """Actors that generate; 0 is one per GPU of the cluster, or one without GPUs."""
