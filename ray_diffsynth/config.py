"""The configuration of each job: one frozen dataclass, checked when it is made.

Names are DiffSynth-Studio's where it has the option. The string below a field is its ``--help`` text. This module
imports no torch, so that ``--help`` is fast.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from ray_diffsynth.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class TaskSpec:
    """What a ``--task`` name stands for: the job that runs it, and whether that job reads a cache."""

    job: Literal["preprocess", "train"]
    reads_cache: bool


TASKS: dict[str, TaskSpec] = {
    "sft": TaskSpec("train", reads_cache=False),
    "sft:data_process": TaskSpec("preprocess", reads_cache=False),
    "sft:train": TaskSpec("train", reads_cache=True),
}


def split_names(value: str | None) -> tuple[str, ...]:
    """``"a, b"`` → ``("a", "b")``; None and the empty string give no names."""
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What both jobs need to know."""

    job: ClassVar[Literal["preprocess", "train"]]

    dataset_base_path: str
    """Folder or URL of the data: pictures and metadata for sft and sft:data_process, the cache for sft:train."""
    model: str | None = None
    """Model in diffusers' layout: a local folder or a Hugging Face id."""
    model_id_with_origin_paths: str | None = None
    """DiffSynth's way to name a model: comma-separated id:pattern, e.g. Qwen/Qwen-Image:vae/*.safetensors."""
    model_paths: str | None = None
    """JSON list of local weight files (a list of shards counts as one entry), each beside its config.json."""
    tokenizer_path: str | None = None
    """Folder of the tokenizer, when it is not the model's own."""
    processor_path: str | None = None
    """Folder of the processor, when it is not the model's own."""
    family: str | None = None
    """Pipeline family or your own module:Class; read from the model when not given."""
    task: str = "sft"
    """What to do: sft:data_process (preprocess), sft:train or the unsplit sft (train)."""
    dataset_metadata_path: str | None = None
    """Metadata file (csv, json, jsonl, parquet); when not given, metadata.* in the base path, else pictures + .txt."""
    data_file_keys: str = "image,video"
    """Comma-separated metadata columns that name files."""
    extra_inputs: str | None = None
    """Comma-separated further metadata columns that are given to the pipeline's units."""
    dataset_num_workers: int = 0
    """CPU processes or threads that decode or read ahead; 0 chooses by the machine."""
    height: int | None = None
    """Height of every picture in pixels; leave height and width empty for dynamic sizes."""
    width: int | None = None
    """Width of every picture in pixels."""
    max_pixels: int = 1024 * 1024
    """Largest area of a picture in pixels with dynamic sizes; larger ones are scaled down."""
    trainable_models: str | None = None
    """Comma-separated models that are trained, e.g. text_encoder; decides which units stage 1 may run."""
    lora_base_model: str | None = None
    """Model that carries the LoRA; dit unless trainable_models is given."""
    output_path: str = "./models"
    """Folder or URL for the results: the cache of preprocess, the LoRA and checkpoints of train."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Number format of the frozen models and of what they compute."""
    seed: int = 0
    """Seed of everything random: the order, the noise, the timesteps and the LoRA's start."""
    batch_size: int = 1
    """Samples that one actor or worker handles at once; one batch holds one size."""
    num_workers: int = 0
    """Actors (preprocess) or workers (train); 0 is one per GPU of the cluster, or one without GPUs."""
    resources: dict[str, float] | None = None
    """Ray resources of one actor or worker, e.g. {"GPU": 1, "CPU": 4}; one GPU each where there are some."""
    ray_address: str | None = None
    """Ray cluster to join, e.g. auto; when not given, the one of RAY_ADDRESS or a local one made for this job."""
    verbose: bool = False
    """Show Ray's own messages too."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot work, and resolve the defaults that depend on other fields."""
        self._check_choices()
        self._check_numbers()
        if not self.dataset_base_path:
            raise ConfigError("dataset_base_path is empty; give the folder of the data, or of the cache for sft:train")
        self._check_task()
        self._check_model()
        if (self.height is None) != (self.width is None):
            raise ConfigError(
                f"height={self.height} and width={self.width}: give both for one fixed size, or neither for dynamic"
            )
        for name, amount in (self.resources or {}).items():
            if not math.isfinite(amount) or amount < 0:
                raise ConfigError(f"resources: {name}={amount} is not an amount; use a number of at least 0")
        if self.lora_base_model is None and not split_names(self.trainable_models):
            object.__setattr__(self, "lora_base_model", "dit")

    @property
    def trained(self) -> tuple[str, ...]:
        """The models that need gradients: ``trainable_models`` and the one with the LoRA, each once."""
        return tuple(dict.fromkeys((*split_names(self.trainable_models), *split_names(self.lora_base_model))))

    @property
    def file_columns(self) -> tuple[str, ...]:
        """``data_file_keys`` as names."""
        return split_names(self.data_file_keys)

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """``extra_inputs`` as names."""
        return split_names(self.extra_inputs)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, for the report and the checkpoint."""
        return dataclasses.asdict(self)

    def _check_choices(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and (value := getattr(self, name)) not in get_args(hint):
                raise ConfigError(f"{name}={value!r} is not known; {did_you_mean(str(value), get_args(hint))}")

    def _check_numbers(self) -> None:
        for name, least in self._minimum().items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise ConfigError(f"{name}={value} is too small; use at least {least}")

    def _minimum(self) -> dict[str, float]:
        return {
            **dict.fromkeys(("height", "width", "max_pixels", "batch_size"), 1),
            **dict.fromkeys(("dataset_num_workers", "seed", "num_workers"), 0),
        }

    def _check_task(self) -> None:
        mine = [name for name, spec in TASKS.items() if spec.job == self.job]
        if self.task not in TASKS:
            raise ConfigError(f"task={self.task!r} is not known; {did_you_mean(self.task, TASKS)}")
        if self.task not in mine:
            other = TASKS[self.task].job
            raise ConfigError(
                f"task={self.task!r} is run by jobs/{other}.py; jobs/{self.job}.py runs {' and '.join(mine)}"
            )

    def _check_model(self) -> None:
        if self.model and (self.model_id_with_origin_paths or self.model_paths):
            raise ConfigError(
                "model and model_id_with_origin_paths (or model_paths) are both given; use one of them, "
                "model being the short form that takes all parts of a folder or hub id"
            )
        if not (self.model or self.model_id_with_origin_paths or self.model_paths):
            raise ConfigError("model is missing; give a diffusers folder or a hub id, e.g. model=Qwen/Qwen-Image")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(CommonConfig):
    """Stage 1: encode a folder of pictures into a cache, on a pool of Ray actors."""

    job: ClassVar[Literal["preprocess", "train"]] = "preprocess"

    task: str = "sft:data_process"
    """What to do: sft:data_process."""
    cache_codec: Literal["planes-zstd", "zstd", "none"] = "planes-zstd"
    """Compression of the cache; planes-zstd stores the two byte planes of bf16 apart, the smallest."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommonConfig):
    """Stage 2: train a LoRA from the cache of preprocess (sft:train), or from pictures in one go (sft)."""

    job: ClassVar[Literal["preprocess", "train"]] = "train"

    task: str = "sft:train"
    """What to do: sft:train from a cache, or sft from pictures without one."""
    dataset_repeat: int = 1
    """How often every sample is seen in one epoch."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW."""
    num_epochs: int = 1
    """Passes over the data, each dataset_repeat times as long as the data."""
    max_steps: int | None = None
    """End after this many optimizer steps, even within an epoch."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    lora_target_modules: str | None = None
    """Comma-separated layer names that get a LoRA, or re:<regular expression>; the family's list when not given."""
    lora_rank: int = 32
    """Rank of the LoRA."""
    lora_alpha: float | None = None
    """Scale of the LoRA times its rank; the rank itself when not given."""
    lora_checkpoint: str | None = None
    """LoRA file whose weights the training starts from."""
    preset_lora_path: str | None = None
    """LoRA file that is fused into the frozen base before training."""
    preset_lora_model: str | None = None
    """Model that preset_lora_path is fused into; lora_base_model when not given."""
    use_gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    use_gradient_checkpointing_offload: bool = False
    """Keep the checkpointed activations in main memory; implies use_gradient_checkpointing."""
    gradient_accumulation_steps: int = 1
    """Batches of each worker that make one optimizer step."""
    save_steps: int | None = None
    """Save a LoRA and a checkpoint every this many steps; at the end of each epoch when not given."""
    loss_weighting: Literal["bell", "none"] = "bell"
    """Weight of the loss over the timesteps: DiffSynth's bell curve, or none."""
    min_timestep_boundary: float = 0.0
    """Start of the part of the schedule that is trained, as a fraction; 0 is pure noise."""
    max_timestep_boundary: float = 1.0
    """End of the part of the schedule that is trained, as a fraction; 1 is the clean picture."""
    resume: str = "auto"
    """auto goes on from the newest checkpoint in output_path, never starts anew, or the folder of one checkpoint."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept (the LoRA files all are)."""
    log_every: int = 1
    """Steps between two reported losses."""

    def __post_init__(self) -> None:
        """Check what the base does not, see there."""
        super().__post_init__()
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate} trains nothing; use a number above 0, e.g. 1e-4")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ConfigError(f"lora_alpha={self.lora_alpha} switches the LoRA off; use a number above 0")
        low, high = self.min_timestep_boundary, self.max_timestep_boundary
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"min_timestep_boundary={low} and max_timestep_boundary={high} enclose nothing; "
                "use fractions with 0 <= min < max <= 1"
            )
        if self.preset_lora_model and not self.preset_lora_path:
            raise ConfigError("preset_lora_model is given without preset_lora_path; give the file too, or neither")
        if self.preset_lora_path and not self.preset_lora_model:
            object.__setattr__(self, "preset_lora_model", self.lora_base_model or "dit")
        if self.use_gradient_checkpointing_offload:
            object.__setattr__(self, "use_gradient_checkpointing", True)
        if not self.resume:
            raise ConfigError("resume is empty; use auto, never, or the folder of a checkpoint")

    @property
    def reads_cache(self) -> bool:
        """Whether dataset_base_path is a cache."""
        return TASKS[self.task].reads_cache

    def _minimum(self) -> dict[str, float]:
        positive = (
            *("dataset_repeat", "num_epochs", "max_steps", "lora_rank", "gradient_accumulation_steps"),
            *("save_steps", "keep_checkpoints", "log_every"),
        )
        zero = ("learning_rate", "lora_alpha", "weight_decay", "max_grad_norm")
        return {**super()._minimum(), **dict.fromkeys(positive, 1), **dict.fromkeys(zero, 0.0)}


Config = PreprocessConfig | TrainConfig
