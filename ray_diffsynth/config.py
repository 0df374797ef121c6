"""The configuration of each job: one frozen dataclass, checked when it is made.

Names are DiffSynth-Studio's where it has the option. The string below a field is its ``--help`` text. This module
imports no torch, so that ``--help`` is fast.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from ray_diffsynth.errors import ConfigError, did_you_mean
from ray_diffsynth.generate_config import GenerateConfig as GenerateConfig
from ray_diffsynth.job_config import JobConfig, JobName
from ray_diffsynth.option_effects import check_effects, resolve_defaults
from ray_diffsynth.train_options import TrainOptions, worker_range


@dataclass(frozen=True)
class TaskSpec:
    """What a ``--task`` name stands for: the job that runs it, and whether that job reads a cache."""

    job: Literal["preprocess", "train"]
    reads_cache: bool


TASKS: dict[str, TaskSpec] = {
    "sft": TaskSpec("train", reads_cache=False),
    "sft:data_process": TaskSpec("preprocess", reads_cache=False),
    "sft:train": TaskSpec("train", reads_cache=True),
    "direct_distill": TaskSpec("train", reads_cache=False),
    "direct_distill:data_process": TaskSpec("preprocess", reads_cache=False),
    "direct_distill:train": TaskSpec("train", reads_cache=True),
}


POOL_KEYS = ("num_gpus", "num_cpus", "batch_size", "min_size", "max_size")
"""What ``pools`` says of a group's actors."""


def split_names(value: str | None) -> tuple[str, ...]:
    """``"a, b"`` → ``("a", "b")``; None and the empty string give no names."""
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


def _by_model(targets: str | None) -> dict[str, str] | None:
    """``"dit=to_q,to_k;text_encoder=q_proj"`` as a mapping; None for a list without model names."""
    parts = re.split(r";(?=[\w.]+=)", targets or "")
    pairs = [re.fullmatch(r"\s*([\w.]+)=(.*)", part, re.DOTALL) for part in parts]
    return {pair[1]: pair[2].strip(" ;") for pair in pairs if pair} if all(pairs) else None


@dataclass(frozen=True, kw_only=True)
class CommonConfig(JobConfig):
    """What the two jobs that read a dataset or its cache need to know."""

    dataset_base_path: str
    """Folder or URL of the data: pictures and metadata; the cache for sft:train and direct_distill:train."""
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
    resolution: str | None = None
    """Comma-separated sides, e.g. 512,1024: aspect-ratio buckets of about side x side pixels, not dynamic sizes."""
    num_frames: int | None = None
    """Frames of every video, 4n+1; of a shorter one as many as it has. 81 for a model of videos when not given."""
    fps: float | None = None
    """Frames per second at which videos are read; every frame in turn when not given."""
    max_upscale: float | None = None
    """Largest factor by which a picture may be enlarged, 1 for none; one that needs more goes to quarantine."""
    max_crop: float | None = None
    """Largest fraction of a picture that may be cut away, e.g. 0.3; one that loses more goes to quarantine."""
    max_decode_memory: float = 4.0
    """GiB of main memory that decoding one file may take, by its header; a larger one goes to quarantine."""
    trainable_models: str | None = None
    """Comma-separated models that are trained, e.g. text_encoder; decides which units stage 1 may run."""
    lora_base_model: str | None = None
    """Comma-separated models that get a LoRA each, e.g. dit,text_encoder; dit unless trainable_models is given."""
    batch_size: int = 1
    """Samples that one actor or worker handles at once; one batch holds one size."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot work, and resolve the defaults that depend on other fields."""
        super().__post_init__()
        if not self.dataset_base_path:
            raise ConfigError(
                "dataset_base_path is empty; give the folder of the data, or of the cache for the :train tasks"
            )
        self._check_task()
        if (self.height is None) != (self.width is None):
            raise ConfigError(
                f"height={self.height} and width={self.width}: give both for one fixed size, or neither for dynamic"
            )
        self._check_resolution()
        if self.max_upscale is not None and not self.max_upscale >= 1:
            raise ConfigError(f"max_upscale={self.max_upscale} is a factor; give 1 (nothing is enlarged) or more")
        if self.max_crop is not None and not 0 <= self.max_crop <= 1:
            raise ConfigError(f"max_crop={self.max_crop} is a fraction of the picture; give a number from 0 to 1")
        if not 0 < self.max_decode_memory < math.inf:
            raise ConfigError(
                f"max_decode_memory={self.max_decode_memory} lets no file be decoded; give GiB above 0, e.g. 4"
            )
        if self.lora_base_model is None and not split_names(self.trainable_models):
            object.__setattr__(self, "lora_base_model", "dit")

    @property
    def trained(self) -> tuple[str, ...]:
        """The models that need gradients: ``trainable_models`` and the one with the LoRA, each once."""
        return tuple(dict.fromkeys((*split_names(self.trainable_models), *split_names(self.lora_base_model))))

    @property
    def resolutions(self) -> tuple[int, ...]:
        """``resolution`` as numbers."""
        return tuple(int(side) for side in split_names(self.resolution))

    @property
    def file_columns(self) -> tuple[str, ...]:
        """``data_file_keys`` as names."""
        return split_names(self.data_file_keys)

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """``extra_inputs`` as names."""
        return split_names(self.extra_inputs)

    def _minimum(self) -> dict[str, float]:
        return {
            **super()._minimum(),
            **dict.fromkeys(("height", "width", "max_pixels", "num_frames", "batch_size"), 1),
            "dataset_num_workers": 0,
        }

    def _check_resolution(self) -> None:
        for side in split_names(self.resolution):
            if not (side.isascii() and side.isdigit() and int(side) > 0):
                raise ConfigError(
                    f"resolution={self.resolution!r}: {side!r} is not a side in pixels; write 1024 or 512,1024"
                )
        if self.resolution and self.height is not None:
            raise ConfigError("resolution and height/width are both given; a fixed size has one bucket: leave one out")

    def _check_task(self) -> None:
        mine = [name for name, spec in TASKS.items() if spec.job == self.job]
        if self.task not in TASKS:
            raise ConfigError(f"task={self.task!r} is not known; {did_you_mean(self.task, TASKS)}")
        if self.task not in mine:
            other = TASKS[self.task].job
            raise ConfigError(
                f"task={self.task!r} is run by jobs/{other}.py; jobs/{self.job}.py runs {' and '.join(mine)}"
            )


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(CommonConfig):
    """Stage 1: encode a folder of pictures into a cache, on a pool of Ray actors."""

    job: ClassVar[JobName] = "preprocess"

    task: str = "sft:data_process"
    """What to do: sft:data_process, or direct_distill:data_process for the pictures of a teacher."""
    cache_codec: Literal["planes-zstd", "zstd", "none"] = "planes-zstd"
    """Compression of the cache; planes-zstd stores the two byte planes of bf16 apart, the smallest."""
    pools: dict[str, dict[str, float]] | None = None
    """Encode the groups side by side: for each its actors, e.g. {"vae": {"num_gpus": 0.3, "batch_size": 4}}; the keys
    are num_gpus, num_cpus, batch_size, min_size and max_size."""
    max_quarantine: float | None = None
    """Fail when more samples than this are in quarantine: a count, or a fraction of all samples below 1."""
    retry_quarantined: bool = False
    """Try again what could not be encoded before."""
    dry_run: bool = False
    """Only print what would be done: samples per bucket, bytes, what is reused and why not."""

    def __post_init__(self) -> None:
        """Check what the base does not, see there."""
        super().__post_init__()
        for group, pool in (self.pools or {}).items():
            for name, value in pool.items():
                if name not in POOL_KEYS:
                    raise ConfigError(f"pools: {group}: {name} is not known; {did_you_mean(name, POOL_KEYS)}")
                whole = name not in ("num_gpus", "num_cpus")
                if not math.isfinite(value) or value < 0 or (whole and (value < 1 or value != int(value))):
                    kind = "a whole number from 1" if whole else "a number of at least 0"
                    raise ConfigError(f"pools: {group}: {name}={value} is not {kind}")
            if pool.get("min_size", 1) > pool.get("max_size", math.inf):
                raise ConfigError(
                    f"pools: {group}: min_size={pool['min_size']:g} is above max_size={pool['max_size']:g}"
                )
        most = self.max_quarantine
        if most is not None and not (0 <= most < 1 or most == int(most)):
            raise ConfigError(f"max_quarantine={most}: give a whole number, or a fraction below 1")

    def _minimum(self) -> dict[str, float]:
        return {**super()._minimum(), "max_quarantine": 0}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions, CommonConfig):
    """Stage 2: train a LoRA from the cache of preprocess (sft:train), or from pictures in one go (sft)."""

    job: ClassVar[JobName] = "train"

    task: str = "sft:train"
    """What to do: sft:train from a cache, sft from pictures without one, direct_distill:train or direct_distill."""
    dataset_repeat: int = 1
    """How often every sample is seen in one epoch."""
    learning_rate: float | None = None
    """Learning rate; when not given 1e-4 for AdamW, and customized_optimizer's own default."""
    num_epochs: int | None = None
    """Passes over the data, each dataset_repeat times as long as the data; 1 when max_steps is not given either."""
    max_steps: int | None = None
    """Optimizer steps, in as many passes as they take; with num_epochs the smaller of the two ends the run."""
    weight_decay: float | None = None
    """Weight decay; when not given 0.01 for AdamW, and customized_optimizer's own default."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    lora_target_modules: str | None = None
    """Comma-separated layer names that get a LoRA, or re:<regular expression>; the family's list when not given. For
    several models dit=to_q,to_k;text_encoder=q_proj,v_proj."""
    lora_rank: int | None = None
    """Rank of the LoRA; 32 when not given."""
    lora_alpha: float | None = None
    """Scale of the LoRA times its rank; the rank itself when not given."""
    lora_checkpoint: str | None = None
    """LoRA file whose weights the training starts from; one for each of several lora_base_model, with commas."""
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
    """auto goes on from the newest checkpoint in output_path; never starts anew, and sets what lies there aside; or the
    folder of one checkpoint. After a kill the same command goes on, whichever it is."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept (the LoRA files all are)."""
    log_every: int = 1
    """Steps between two reported losses."""
    num_workers: int | str = 0  # type: ignore[assignment]  # a range too
    """Workers; 1..8 for as many as there are, which may come and go; 0 is one per GPU, or one without GPUs."""

    def __post_init__(self) -> None:
        """Check what the base does not, see there."""
        super().__post_init__()
        worker_range(self.num_workers)
        if self.use_gradient_checkpointing_offload:
            object.__setattr__(self, "use_gradient_checkpointing", True)
        check_effects(self)
        resolve_defaults(self)
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate} trains nothing; use a number above 0, e.g. 1e-4")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ConfigError(f"lora_alpha={self.lora_alpha} switches the LoRA off; use a number above 0")
        low, high = self.min_timestep_boundary, self.max_timestep_boundary
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"min_timestep_boundary={low} and max_timestep_boundary={high} enclose nothing; "
                "use fractions with 0 <= min < max <= 1"
            )
        if self.preset_lora_path and not self.preset_lora_model:
            object.__setattr__(self, "preset_lora_model", (*self.lora_models, "dit")[0])
        self._check_loras()
        self.check_options()
        self._check_optimisation()
        if not self.resume:
            raise ConfigError("resume is empty; use auto, never, or the folder of a checkpoint")

    @property
    def reads_cache(self) -> bool:
        """Whether dataset_base_path is a cache."""
        return TASKS[self.task].reads_cache

    @property
    def worker_range(self) -> tuple[int, int]:
        """Least and most workers; (0, 0) leaves the number to the cluster."""
        return worker_range(self.num_workers)

    @property
    def lora_models(self) -> tuple[str, ...]:
        """``lora_base_model`` as names."""
        return split_names(self.lora_base_model)

    def lora_targets(self, model: str) -> str | None:
        """What ``lora_target_modules`` says of one model; None when that is the family's list."""
        own = _by_model(self.lora_target_modules)
        return self.lora_target_modules if own is None else own.get(model)

    @property
    def lora_checkpoints(self) -> dict[str, str]:
        """``lora_checkpoint`` by model; the path itself when there is one model, whatever characters it has."""
        one = len(self.lora_models) == 1
        paths = (self.lora_checkpoint,) if one and self.lora_checkpoint else split_names(self.lora_checkpoint)
        return dict(zip(self.lora_models, paths, strict=bool(paths)))

    def _check_optimisation(self) -> None:
        if "weight_decay" in (self.optimizer_arguments or {}) and self.weight_decay is not None:
            raise ConfigError("weight_decay is given twice, also in optimizer_arguments; leave one of them out")
        if self.max_steps is not None and self.lr_warmup_steps >= self.max_steps:
            raise ConfigError(
                f"lr_warmup_steps={self.lr_warmup_steps} leaves nothing of max_steps={self.max_steps}: the learning "
                "rate would never be reached; warm up for fewer steps, or train longer"
            )

    def _check_loras(self) -> None:
        models = self.lora_models
        for model in _by_model(self.lora_target_modules) or {}:
            if model not in models:
                raise ConfigError(
                    f"lora_target_modules names {model}=…, which has no LoRA; add it to "
                    f"lora_base_model={self.lora_base_model!r}, or {did_you_mean(model, models)}"
                )
        for whole in split_names(self.trainable_models):
            for model in models:
                if f"{whole}.".startswith(f"{model}.") or f"{model}.".startswith(f"{whole}."):
                    raise ConfigError(
                        f"trainable_models={whole} and lora_base_model={model} train the same weights, whole and by a "
                        "LoRA on them; leave one of them out"
                    )
        given = split_names(self.lora_checkpoint)
        if given and len(models) != 1 and len(given) != len(models):
            raise ConfigError(
                f"lora_checkpoint names {len(given)} files for {len(models)} models with a LoRA; give one a model, in "
                f"the order of lora_base_model={self.lora_base_model!r}"
            )

    def _minimum(self) -> dict[str, float]:
        positive = (
            *("dataset_repeat", "num_epochs", "max_steps", "lora_rank", "gradient_accumulation_steps"),
            *("save_steps", "keep_checkpoints", "log_every"),
        )
        zero = ("learning_rate", "lora_alpha", "weight_decay", "max_grad_norm")
        least = {**super()._minimum(), **dict.fromkeys(positive, 1), **dict.fromkeys(zero, 0.0)}
        least.pop("num_workers")  # see worker_range
        return {**least, **self.positive_options()}


Config = PreprocessConfig | TrainConfig | GenerateConfig
