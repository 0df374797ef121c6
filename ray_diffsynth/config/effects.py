"""What several options need in order to do anything."""

from __future__ import annotations

from typing import Any

from ray_diffsynth.config.options import Effect
from ray_diffsynth.urls import is_remote


def needs(name: str, value: str | None = None) -> Effect:
    """The option does nothing unless another one is given, or has this value."""
    wanted = name if value is None else f"{name}={value}"

    def when(config: Any) -> bool:
        found = getattr(config, name)
        return bool(found) if value is None else bool(found == value)

    return Effect(when, f"it needs {wanted}; give that too, or leave it out")


def reads_cache(config: Any) -> bool:
    """Whether the job reads a cache, in which images are encoded already."""
    return bool(getattr(config, "reads_cache", False))


def unless_cached(reason: str) -> Effect:
    """The option has an effect unless the job reads a cache."""
    return Effect(lambda config: not reads_cache(config), reason, noted=True)


def unless_cached_or_drawn(reason: str) -> Effect:
    """Likewise, and also where sample images are drawn during training."""
    return Effect(
        lambda config: not reads_cache(config) or bool(config.validation_prompts),
        reason,
        noted=True,
    )


def _encodes(config: Any) -> bool:
    """Whether the job may load an encoder: a cache of stage 1 leaves only the trained models."""
    return not reads_cache(config) or bool(config.validation_prompts) or not {"dit", "dit2"}.issuperset(config.trained)


METADATA_COLUMNS = unless_cached("the cache was made from these columns in preprocess")
IMAGES = unless_cached("the cache holds encoded images, whose size is fixed")
VIDEOS = unless_cached("the cache holds encoded videos, whose frames are fixed")
IMAGE_SIZE = unless_cached_or_drawn(IMAGES.reason)
FRAMES = unless_cached_or_drawn(VIDEOS.reason)
TOKENS = Effect(_encodes, "the cache holds encoded captions, so that no tokenizer or processor is used", noted=True)
ADAMW = Effect(
    lambda config: config.customized_optimizer is None,
    "it is AdamW's, and customized_optimizer takes its place; give that one's by optimizer_arguments, or leave it out",
)
LORA = Effect(
    lambda config: bool(config.lora_models),
    "no LoRA is trained, but the whole of trainable_models; name a LoRA's model by lora_base_model, or leave it out",
)
DRAWN = "direct_distill runs every step of the student's schedule and draws no timestep; leave it out"
TIMESTEPS = Effect(lambda config: not str(config.task).startswith("direct_distill"), DRAWN)
BOUNDARIES = Effect(TIMESTEPS.when, DRAWN, noted=True)
WORKERS = Effect(
    lambda config: getattr(config, "pools", None) is None, "pools says for each group what actors it has", noted=True
)
REMOTE_CACHE = Effect(
    lambda config: reads_cache(config) and is_remote(config.dataset_base_path),
    "it keeps copies of the files of a remote cache (a URL), and this data is read where it lies; leave it out",
)
SEVERAL_WORKERS = Effect(
    lambda config: config.worker_range != (1, 1), "one worker has nobody to share with; raise num_workers"
)
