"""`BasePipeline`: the models of a family, the units that prepare its inputs, and its `model_fn`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ray_diffsynth.diffusion.flow_match import NUM_TRAIN_TIMESTEPS, FlowMatchScheduler
from ray_diffsynth.models.folder import read_json
from ray_diffsynth.models.integrity import check_companion, check_part
from ray_diffsynth.models.load import load_companion, load_part
from ray_diffsynth.models.locate import ModelSource, locate_model
from ray_diffsynth.pipelines.core.batch import PipelineError as PipelineError
from ray_diffsynth.pipelines.core.batch import join, pad_and_mask
from ray_diffsynth.pipelines.core.graph import model_root
from ray_diffsynth.pipelines.core.unit import PipelineUnit, PipelineUnitRunner, missing_input
from ray_diffsynth.pipelines.core.versions import stated_versions

LORA_AND_SAMPLING = (
    "defaults", "default_num_frames", "family", "in_iteration_models", "lora_aliases", "lora_prefix", "lora_targets",
    "noise_dtype", "schedule",
)  # fmt: skip
"""What a pipeline class may set without changing anything that is encoded."""


class MissingModelError(PipelineError):
    """A unit or `model_fn` runs a model that was not loaded."""


@dataclass(frozen=True)
class Part:
    """A component of the model folder: where it lies, its class, and the parts that it is no use without."""

    subfolder: str
    cls: str
    """`library:Class`, e.g. `diffusers:QwenImageTransformer2DModel`."""
    companions: tuple[str, ...] = ()
    """Names in `BasePipeline.companions`, e.g. the tokenizer of a text encoder."""


class BasePipeline(torch.nn.Module):
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
    parts: ClassVar[Mapping[str, Part]] = {}
    companions: ClassVar[Mapping[str, Part]] = {}
    """Tokenizers and processors: no weights, loaded with the part that names them."""
    schedule: ClassVar[str] = ""
    """Name in `diffusion.flow_match.SCHEDULES`."""
    column_params: ClassVar[Mapping[str, str]] = {"input_image": "image", "prompt": "prompt"}
    """Parameter <- metadata column."""
    file_params: ClassVar[tuple[str, ...]] = ("input_image",)
    """Parameters whose column names files, whatever `--data_file_keys` says."""
    video_params: ClassVar[tuple[str, ...]] = ()
    """Those of a model of videos that are given as frames, uint8 (F, H, W, 3); the others are pictures."""
    reference_params: ClassVar[tuple[str, ...]] = ()
    """File parameters whose pictures may have another size than the target: each is cut by its own shape."""
    default_num_frames: ClassVar[int] = 1
    """`--num_frames` where it is not given."""
    padded_params: ClassVar[Mapping[str, str]] = {}
    """Parameters (1, L, D) of differing L that `collate` pads -> name of the mask (B, L) that it makes."""
    listed_params: ClassVar[tuple[str, ...]] = ()
    """Parameters that `collate` leaves as a list, one entry a sample: the model takes lists."""
    collate_outputs: ClassVar[tuple[str, ...]] = ()
    """Names that `collate` surely writes."""
    lora_prefix: ClassVar[str] = "diffusion_model."
    """What the LoRA file's keys start with, so that diffusers, ComfyUI and DiffSynth-Studio load it."""
    lora_targets: ClassVar[tuple[str, ...]] = ()
    """Default target modules of a LoRA on `dit`."""
    lora_aliases: ClassVar[Mapping[str, str]] = {}
    """Names of target modules that users of the original model know -> those of `dit` here."""

    units: list[PipelineUnit]
    model_fn: Callable[..., Tensor]
    scheduler: FlowMatchScheduler
    in_iteration_models: tuple[str, ...] = ("dit",)

    def __init__(
        self,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.bfloat16,
        height_division_factor: int = 16,
        width_division_factor: int = 16,
        time_division_factor: int | None = None,
        time_division_remainder: int | None = None,
    ) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.torch_dtype = torch_dtype
        self.height_division_factor = height_division_factor
        self.width_division_factor = width_division_factor
        self.time_division_factor = time_division_factor
        self.time_division_remainder = time_division_remainder
        self.unit_runner = PipelineUnitRunner()  # DiffSynth-Studio's way to run a unit; `run_units` runs several
        self.units = []
        if self.schedule:
            self.scheduler = FlowMatchScheduler(self.schedule)
        for name in (*self.parts, *self.companions):
            setattr(self, name, None)

    @classmethod
    def code_version(cls) -> str:
        """Identity of what units get from the pipeline, for cache keys: the versions of its classes.

        Raises CacheKeyError for a class without a version of its own.
        """
        return stated_versions(cls, BasePipeline, LORA_AND_SAMPLING)

    def prompt_templates(self) -> Mapping[str, str]:
        """Texts that a library, not the tokenizer, puts around a prompt: name -> text, part of the keys of texts."""
        return {}

    # ---------------------------------------------------------------- loading

    @classmethod
    def skeleton(cls) -> Self:
        """The units and declarations without any weights: enough to plan a split."""
        return cls()

    @classmethod
    def configured(cls, source: ModelSource) -> Self:
        """`skeleton` with what the model's configuration files say: sizes, schedule. Raises as `configure`."""
        pipe = cls.skeleton()
        pipe._configure(source)
        return pipe

    @classmethod
    def from_pretrained(
        cls,
        source: ModelSource | str | Path,
        *,
        models: Collection[str] | None = None,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """Load `models` (names of `parts`; None: all that `source` has), frozen, in eval mode; reads no other weights.

        Raises:
            PipelineError: a name that the family does not have, or that `source` does not name.
            ModelFolderError: a part's folder is unusable.
        """
        if not isinstance(source, ModelSource):
            source = locate_model(str(source))
        if models is None:
            wanted = [name for name, part in cls.parts.items() if source.has(part.subfolder)]
        else:
            wanted = list(dict.fromkeys(model_root(name) for name in models))
        pipe = cls(device=device, torch_dtype=torch_dtype)
        for name in wanted:
            if name not in cls.parts:
                raise PipelineError(f"{cls.__name__} has no model {name!r}; it has {', '.join(cls.parts)}")
            part = cls.parts[name]
            if not source.has(part.subfolder):
                raise PipelineError(
                    f"the {name} is needed, but {source.model_id} does not give it: "
                    f"name {part.subfolder}/*.safetensors "
                    "in --model_id_with_origin_paths too, or give the whole folder by --model"
                )
            setattr(pipe, name, load_part(source, part.subfolder, part.cls, torch_dtype=torch_dtype, device=device))
            for companion in part.companions:
                other = cls.companions[companion]
                setattr(pipe, companion, load_companion(source, other.subfolder, other.cls))
        pipe._configure(source)
        return pipe.eval().requires_grad_(False)

    @classmethod
    def check_files(cls, source: ModelSource, models: Collection[str]) -> None:
        """Look at the files of `models` and their companions without reading weights; for the driver, before Ray.

        Raises:
            ModelFolderError: one is a Git LFS pointer, a web page, cut off, empty or damaged; says the fix.
        """
        for name in dict.fromkeys(model_root(model) for model in models):
            if (part := cls.parts.get(name)) is None or not source.has(part.subfolder):
                continue
            check_part(source, part.subfolder)
            for companion in part.companions:
                check_companion(source, cls.companions[companion].subfolder)

    def _configure(self, source: ModelSource) -> None:
        if self.schedule:
            self.scheduler = FlowMatchScheduler(self.schedule, config=_scheduler_config(source))
        self.configure(source)

    def configure(self, source: ModelSource) -> None:
        """Read what a family needs from configuration files of parts whose weights are not loaded; a hook.

        It is called when a run is planned too: raise PipelineError there for a model that the family cannot take.
        """

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the models, and remember device and dtype for the parameters that units make."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                self.torch_dtype = value
            elif isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                self.device = torch.device(value)
        return super().to(*args, **kwargs)

    def load_models_to_device(self, names: Sequence[str]) -> None:
        """Make sure that the models are loaded and on the pipeline's device.

        Raises:
            MissingModelError: a model is not loaded; names it and the units that need it.
        """
        for name in [names] if isinstance(names, str) else names:
            model = getattr(self, model_root(name), None)
            if model is None:
                users = [type(unit).__name__ for unit in self.units if name in (unit.onload_model_names or ())]
                users += ["model_fn"] if name in self.in_iteration_models else []
                raise MissingModelError(
                    f"the model {name!r} is not loaded, but {' and '.join(users) or 'the pipeline'} needs it: "
                    f"load it by from_pretrained(models=[…, {name!r}])"
                )
            if isinstance(model, torch.nn.Module):
                weight = next(model.parameters(), None)
                if weight is not None and weight.device != self.device:
                    model.to(self.device)

    # ---------------------------------------------------------------- helpers of units

    def preprocess_image(
        self,
        image: Image.Image | np.ndarray[Any, Any] | Tensor,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        min_value: float = -1.0,
        max_value: float = 1.0,
    ) -> Tensor:
        """A PIL image, or uint8 pixels (H, W, 3), as (1, 3, H, W) in [min_value, max_value]; computed in fp32."""
        if isinstance(image, Image.Image):
            image = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        pixels = torch.as_tensor(image)
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise PipelineError(
                f"an image must be a PIL image or uint8 pixels (height, width, 3), "
                f"not {pixels.dtype} {tuple(pixels.shape)}"
            )
        # Turned as bytes and scaled in place: a quarter of the memory to go through, and the same numbers.
        planes = pixels.to(device or self.device).permute(2, 0, 1)[None].contiguous()
        scaled = planes.float().mul_((max_value - min_value) / 255).add_(min_value)
        return scaled.to(torch_dtype or self.torch_dtype)

    def vae_output_to_image(self, vae_output: Tensor, min_value: float = -1.0, max_value: float = 1.0) -> Image.Image:
        """Pixels (1, 3, H, W) in [min_value, max_value] as a PIL image."""
        scaled = (vae_output[0].float() - min_value) * (255 / (max_value - min_value))
        pixels = scaled.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        return Image.fromarray(pixels.cpu().numpy())

    def generate_noise(
        self,
        shape: Sequence[int],
        seed: int | None = None,
        rand_device: str | torch.device = "cpu",
        rand_torch_dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Gaussian noise of `shape`, by the seed; without one it differs each time (no global generator is used)."""
        generator = torch.Generator(rand_device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        noise = torch.randn(tuple(shape), generator=generator, device=rand_device, dtype=rand_torch_dtype)
        return noise.to(device=device or self.device, dtype=torch_dtype or self.torch_dtype)

    def initial_noise(self, shape: Sequence[int], seed: int | None, rand_device: str = "cpu") -> Tensor:
        """The noise that `__call__` starts from; direct distillation starts from it again."""
        return self.generate_noise(shape, seed, rand_device, rand_torch_dtype=self.torch_dtype)

    def sampling_schedule(self, latents: Tensor, num_inference_steps: int) -> FlowMatchScheduler:
        """The schedule by which `__call__` samples `latents` in so many steps; `self.scheduler` stays as it is.

        A family whose schedule depends on the number of tokens overrides it.
        """
        schedule = FlowMatchScheduler(self.schedule, config=self.scheduler.config)
        schedule.set_timesteps(num_inference_steps)
        return schedule

    def shifted_schedule(self, latents: Tensor) -> FlowMatchScheduler:
        """The 1000 timesteps that `--timestep_sampling shift` draws from: those at which `latents` are sampled.

        A family whose shift depends on the number of steps overrides it, with the number that it samples in.
        """
        return self.sampling_schedule(latents, NUM_TRAIN_TIMESTEPS)

    def check_resize_height_width(self, height: int, width: int, num_frames: int | None = None) -> tuple[int, ...]:
        """Return the size if the family can make it. DiffSynth-Studio's name; here nothing is rounded.

        Raises:
            PipelineError: a size that does not divide; gives the nearest that do.
        """
        for name, value, factor in (
            ("height", height, self.height_division_factor),
            ("width", width, self.width_division_factor),
        ):
            if value <= 0 or value % factor:
                lower = value // factor * factor
                choices = f"{lower} or {lower + factor}" if lower > 0 else str(factor)
                raise PipelineError(f"{name}={value} is not a multiple of {factor}; use {choices}")
        if num_frames is None:
            return height, width
        factor, remainder = self.time_division_factor or 1, self.time_division_remainder or 0
        if num_frames <= 0 or num_frames % factor != remainder:
            lower = (num_frames - remainder) // factor * factor + remainder
            raise PipelineError(
                f"num_frames={num_frames} is not a multiple of {factor} plus {remainder}; "
                f"use {lower} or {lower + factor}"
            )
        return height, width, num_frames

    def step(
        self, scheduler: FlowMatchScheduler, latents: Tensor, progress_id: int, noise_pred: Tensor, **others: Any
    ) -> Tensor:
        """One sampling step, DiffSynth-Studio's helper; `others` (the rest of the shared inputs) are not used."""
        return scheduler.step(noise_pred, scheduler.timesteps[progress_id], latents)

    # ---------------------------------------------------------------- training

    def original_lora_key(self, key: str) -> str:
        """A LoRA key of `dit` as it stands in files, after `lora_prefix`: with the names of the original model."""
        return key

    def training_settings(self) -> dict[str, Any]:
        """Constants of units and `model_fn` in both stages; `--pipeline_settings` or a column may replace them."""
        return {
            "cfg_scale": 1.0,
            "denoising_strength": 1.0,
            "rand_device": "cpu",
            "seed": 0,
            "tiled": False,
            "tile_size": 128,
            "tile_stride": 64,
            "use_gradient_checkpointing": False,
            "use_gradient_checkpointing_offload": False,
        }

    def sampling_settings(self) -> dict[str, Any]:
        """Of `training_settings` those that have another value in `__call__`, for a task that samples as it does."""
        return {}

    def model_fn_params(self) -> tuple[str, ...]:
        """Parameters that `model_fn` names, without the models; what it takes by `**kwargs` only is not passed."""
        return tuple(name for name in _named_parameters(self.model_fn) if name not in self.in_iteration_models)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch from the parameters of its samples (flat: what the positive side sees).

        Tensors are joined along axis 0; `padded_params` are padded with zeros to the longest and get a mask, bool
        (B, L), or None if nothing is padded. Settings stay one value, anything else becomes a list, one entry a sample;
        what is None in every sample stays None.

        Raises:
            PipelineError: tensors of differing shapes, a parameter that some samples lack, a setting that differs.
        """
        names = list(dict.fromkeys(name for sample in samples for name in sample))
        settings = self.training_settings()
        batch: dict[str, Any] = {}
        for name in names:
            lacking = [i for i, sample in enumerate(samples) if name not in sample]
            if lacking:
                raise PipelineError(f"samples {lacking} of the batch lack the parameter {name!r} that the others have")
            values = [sample[name] for sample in samples]
            if name in self.padded_params:
                batch[name], batch[self.padded_params[name]] = pad_and_mask(values)
            elif name in self.padded_params.values():
                continue  # made with the parameter that it masks
            elif name in self.listed_params:
                batch[name] = values
            else:
                batch[name] = join(name, values, is_setting=name in settings)
        return batch

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """Call `model_fn` with the models of the iteration and those parameters of `batch` that it names.

        Raises:
            MissingInputError: a parameter without a default is not in `batch`.
        """
        self.load_models_to_device(self.in_iteration_models)
        inputs: dict[str, Any] = {name: getattr(self, name) for name in self.in_iteration_models}
        for name, parameter in _named_parameters(self.model_fn).items():
            if name in inputs:
                continue
            if name in batch:
                inputs[name] = batch[name]
            elif parameter.default is inspect.Parameter.empty:
                raise missing_input("model_fn", name, self)
        return self.model_fn(**inputs)

    def guided_prediction(self, posi: Mapping[str, Any], nega: Mapping[str, Any], cfg_scale: float) -> Tensor:
        """Classifier-free guidance: nega + cfg_scale * (posi - nega); the positive side alone if cfg_scale is 1."""
        prediction = self.predict(posi)
        if cfg_scale == 1:
            return prediction
        negative = self.predict(nega)
        return negative + cfg_scale * (prediction - negative)


def _named_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


def _scheduler_config(source: ModelSource) -> dict[str, Any] | None:
    path = source.folder("scheduler") / "scheduler_config.json"
    if not path.is_file():
        return None
    return read_json(path)
