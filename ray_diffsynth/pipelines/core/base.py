"""`BasePipeline`: the models of a family, the units that prepare its inputs, and its `model_fn`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from ray_diffsynth.pipelines.core.image_conversion import ImageConversion
from ray_diffsynth.pipelines.core.runner import PipelineUnitRunner
from ray_diffsynth.pipelines.core.sampling import Sampling
from ray_diffsynth.pipelines.core.versions import stated_versions

LORA_AND_SAMPLING = (
    "defaults", "default_num_frames", "family", "in_iteration_models", "lora_aliases", "lora_prefix", "lora_targets",
    "noise_dtype", "schedule",
)  # fmt: skip
"""What a pipeline class may set without changing anything that is encoded."""


class BasePipeline(Sampling, ImageConversion):
    """Base of all families. A subclass sets the class attributes, `units` and `model_fn`, and implements `__call__`.

    Models are attributes named as in `parts` (None until loaded). Units and `model_fn` work on one sample's parameters
    or on a batch made by `collate`.
    """

    family: ClassVar[str] = ""
    version: ClassVar[int] = 1
    """Part of the cache key, as `PipelineUnit.version`; a class that sets nothing but LORA_AND_SAMPLING needs none."""
    pixel_transforms: ClassVar[Mapping[str, int]] = {"preprocess_image": 1}
    """What the pipeline does to pixels for its units -> version, part of the keys of what is encoded from pixels.
    `tiling` counts where the VAE works in tiles."""
    text_libraries: ClassVar[tuple[str, ...]] = ()
    """Further packages whose code decides what a prompt becomes."""
    column_params: ClassVar[Mapping[str, str]] = {"input_image": "image", "prompt": "prompt"}
    """Parameter <- metadata column."""
    file_params: ClassVar[tuple[str, ...]] = ("input_image",)
    """Parameters whose column names files, whatever `--data_file_keys` says."""
    video_params: ClassVar[tuple[str, ...]] = ()
    """Those of a model of videos that are given as frames, uint8 (F, H, W, 3); the others are images."""
    reference_params: ClassVar[tuple[str, ...]] = ()
    """File parameters whose images may have another size than the target: each is cut by its own shape."""
    default_num_frames: ClassVar[int] = 1
    """`--num_frames` where it is not given."""
    lora_prefix: ClassVar[str] = "diffusion_model."
    """What the LoRA file's keys start with, so that diffusers, ComfyUI and DiffSynth-Studio load it."""
    lora_targets: ClassVar[tuple[str, ...]] = ()
    """Default target modules of a LoRA on `dit`."""
    lora_aliases: ClassVar[Mapping[str, str]] = {}
    """Names of target modules that users of the original model know -> those of `dit` here."""

    def __init__(
        self,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.bfloat16,
        height_division_factor: int = 16,
        width_division_factor: int = 16,
        time_division_factor: int | None = None,
        time_division_remainder: int | None = None,
    ) -> None:
        super().__init__(device, torch_dtype)
        self.height_division_factor = height_division_factor
        self.width_division_factor = width_division_factor
        self.time_division_factor = time_division_factor
        self.time_division_remainder = time_division_remainder
        self.unit_runner = PipelineUnitRunner()  # DiffSynth-Studio's way to run a unit; `run_units` runs several

    @classmethod
    def code_version(cls) -> str:
        """Identity of what units get from the pipeline, for cache keys: the versions of its classes.

        Raises CacheKeyError for a class without a version of its own.
        """
        return stated_versions(cls, BasePipeline, LORA_AND_SAMPLING)

    def prompt_templates(self) -> Mapping[str, str]:
        """Texts that a library, not the tokenizer, puts around a prompt: name -> text, part of the keys of texts."""
        return {}

    def original_lora_key(self, key: str) -> str:
        """A LoRA key of `dit` as it stands in files, after `lora_prefix`: with the names of the original model."""
        return key
