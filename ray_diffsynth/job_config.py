"""What every job's configuration has: the model, the machines, the seed; and its checks. See ``config``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args, get_origin, get_type_hints

from ray_diffsynth.errors import ConfigError, did_you_mean

JobName: TypeAlias = Literal["preprocess", "train", "generate"]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every job needs to know."""

    job: ClassVar[JobName]

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
    """Pipeline family, or your own by its module, my_module[:Class]; read from the model when not given."""
    output_path: str = "./models"
    """Folder or URL for the results: the cache of preprocess, the LoRA and checkpoints of train."""
    pipeline_settings: dict[str, Any] | None = None
    """Constants of the family as JSON, e.g. {"tiled": true, "max_sequence_length": 256}; see docs/families.md."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Number format of the frozen models and of what they compute."""
    seed: int = 0
    """Seed of everything random: the order, the noise, the timesteps and the LoRA's start."""
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
        self._check_model()
        for name, amount in (self.resources or {}).items():
            if not math.isfinite(amount) or amount < 0:
                raise ConfigError(f"resources: {name}={amount} is not an amount; use a number of at least 0")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, for the report and the checkpoint."""
        return dataclasses.asdict(self)

    def _check_choices(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if getattr(self, name) is None and type(None) not in get_args(hint):
                raise ConfigError(f"{name} is null; give a value, or leave it out for its default")
            if get_origin(hint) is Literal and (value := getattr(self, name)) not in get_args(hint):
                raise ConfigError(f"{name}={value!r} is not known; {did_you_mean(str(value), get_args(hint))}")

    def _check_numbers(self) -> None:
        for name, least in self._minimum().items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise ConfigError(f"{name}={value} is too small; use at least {least}")

    def _minimum(self) -> dict[str, float]:
        return dict.fromkeys(("seed", "num_workers"), 0)

    def _check_model(self) -> None:
        if self.model and (self.model_id_with_origin_paths or self.model_paths):
            raise ConfigError(
                "model and model_id_with_origin_paths (or model_paths) are both given; use one of them, "
                "model being the short form that takes all parts of a folder or hub id"
            )
        if not (self.model or self.model_id_with_origin_paths or self.model_paths):
            raise ConfigError("model is missing; give a diffusers folder or a hub id, e.g. --model Qwen/Qwen-Image")
