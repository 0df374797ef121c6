"""What each option needs in order to do anything: an option that could not is refused, or noted, never ignored.

A table, so that a new option cannot be forgotten: tests/test_option_effects.py wants each field of the configurations
in `EFFECTS` or in `ALWAYS`. Refused (ConfigError) is what would leave a user with another training than the one that
was asked for. What changes no result is noted in one line by the command line: the flags of DiffSynth-Studio's guide,
and what a YAML file says that several jobs share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.errors import ConfigError
from ray_diffsynth.urls import is_remote


@dataclass(frozen=True)
class Effect:
    """An option has an effect `when` this holds of the configuration; else it is without one for this `reason`."""

    when: Callable[[Any], bool]
    reason: str
    noted: bool = False


def _needs(name: str, value: str | None = None) -> Effect:
    """The option does nothing unless another one is given, or has this value."""
    wanted = name if value is None else f"{name}={value}"

    def when(config: Any) -> bool:
        found = getattr(config, name)
        return bool(found) if value is None else bool(found == value)

    return Effect(when, f"it needs {wanted}; give that too, or leave it out")


def _whole_cache(config: Any) -> bool:
    """Whether the job reads a cache, in which pictures are encoded already."""
    return bool(getattr(config, "reads_cache", False))


def _distils(config: Any) -> bool:
    return str(config.task).startswith("direct_distill")


def _encodes(config: Any) -> bool:
    """Whether the job may load an encoder: a cache of stage 1 leaves only the trained models."""
    return not _whole_cache(config) or bool(config.validation_prompts) or not {"dit", "dit2"}.issuperset(config.trained)


def _by_cache(reason: str) -> Effect:
    return Effect(lambda config: not _whole_cache(config), reason, noted=True)


_COLUMNS = _by_cache("the cache was made from these columns in preprocess")
_PICTURES = _by_cache("the cache holds encoded pictures, whose size is fixed")
_VIDEOS = _by_cache("the cache holds encoded videos, whose frames are fixed")
_SIDES = Effect(
    lambda config: not _whole_cache(config) or bool(config.validation_prompts),
    "the cache holds encoded pictures, whose size is fixed",
    noted=True,
)
_TOKENS = Effect(_encodes, "the cache holds encoded captions, so that no tokenizer or processor is used", noted=True)
_ADAMW = Effect(
    lambda config: config.customized_optimizer is None,
    "it is AdamW's, and customized_optimizer takes its place; give that one's by optimizer_arguments, or leave it out",
)
_LORA = Effect(
    lambda config: bool(config.lora_models),
    "no LoRA is trained, but the whole of trainable_models; name a LoRA's model by lora_base_model, or leave it out",
)
_DRAWS = Effect(
    lambda config: not _distils(config),
    "direct_distill runs every step of the student's schedule and draws no timestep; leave it out",
)
_POOLS = Effect(
    lambda config: getattr(config, "pools", None) is None, "pools says for each group what actors it has", noted=True
)

EFFECTS: dict[str, tuple[Effect, ...]] = {
    "data_file_keys": (_COLUMNS,),
    "dataset_metadata_path": (_by_cache("the cache has an index of its own"),),
    "extra_inputs": (_by_cache("the cache holds the inputs that preprocess was given"),),
    "height": (_SIDES,),
    "width": (_SIDES,),
    "max_pixels": (
        _PICTURES,
        Effect(lambda config: config.height is None, "height and width fix the size", noted=True),
        Effect(lambda config: not config.resolution, "resolution has buckets of its own", noted=True),
    ),
    "resolution": (_PICTURES,),
    "num_frames": (dataclasses.replace(_SIDES, reason=_VIDEOS.reason),),
    "fps": (_VIDEOS,),
    "max_upscale": (_PICTURES,),
    "max_crop": (_PICTURES,),
    "max_decode_memory": (_by_cache("nothing is decoded: the cache holds encoded pictures"),),
    "tokenizer_path": (_TOKENS,),
    "processor_path": (_TOKENS,),
    "num_workers": (_POOLS,),
    "resources": (_POOLS,),
    "adam_beta1": (_ADAMW,),
    "adam_beta2": (_ADAMW,),
    "adam_epsilon": (_ADAMW,),
    "optimizer_arguments": (_needs("customized_optimizer"),),
    "loss_weighting": (_DRAWS,),
    "timestep_sampling": (_DRAWS,),
    "min_timestep_boundary": (dataclasses.replace(_DRAWS, noted=True),),
    "max_timestep_boundary": (dataclasses.replace(_DRAWS, noted=True),),
    "logit_mean": (_needs("timestep_sampling", "logit_normal"),),
    "logit_std": (_needs("timestep_sampling", "logit_normal"),),
    "mode_scale": (_needs("timestep_sampling", "mode"),),
    "timestep_shift": (_needs("timestep_sampling", "shift"),),
    "lora_target_modules": (_LORA,),
    "lora_rank": (_LORA,),
    "lora_alpha": (_LORA,),
    "lora_checkpoint": (_LORA,),
    "lora_dropout": (_LORA,),
    "use_rslora": (_LORA,),
    "use_dora": (_LORA,),
    "lora_format": (_LORA,),
    "preset_lora_model": (_needs("preset_lora_path"),),
    "gradient_checkpointing_every": (_needs("use_gradient_checkpointing"),),
    "shard_base": (
        Effect(lambda config: config.worker_range != (1, 1), "one worker has nobody to share with; raise num_workers"),
    ),
    "validation_steps": (_needs("validation_samples"),),
    "sample_steps": (_needs("validation_prompts"),),
    "sample_inference_steps": (_needs("validation_prompts"),),
    "sample_resources": (_needs("validation_prompts"),),
    "shard_cache": (
        Effect(
            lambda config: _whole_cache(config) and is_remote(config.dataset_base_path),
            "it keeps copies of the files of a remote cache (a URL), and this data is read where it lies; leave it out",
        ),
    ),
    "shard_cache_gb": (_needs("shard_cache"),),
}

ALWAYS = frozenset(
    (
        *("dataset_base_path", "task", "output_path", "seed", "resume", "dry_run", "verbose", "ray_address", "pools"),
        *("model", "model_id_with_origin_paths", "model_paths", "family", "dtype", "pipeline_settings"),
        *("dataset_num_workers", "batch_size", "cache_codec", "max_quarantine", "retry_quarantined"),
        *("trainable_models", "lora_base_model", "preset_lora_path", "dataset_repeat", "num_epochs", "max_steps"),
        *("learning_rate", "weight_decay", "max_grad_norm", "gradient_accumulation_steps", "customized_optimizer"),
        *("lr_scheduler", "lr_warmup_steps", "ema_decay", "caption_dropout", "fp8_base", "save_steps"),
        *("use_gradient_checkpointing", "use_gradient_checkpointing_offload", "keep_checkpoints", "log_every"),
        *("log_with", "validation_samples", "validation_prompts"),
    )
)
"""Options that do something in every configuration, or are refused elsewhere with what they lack."""

DEFAULTS: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "lora_rank": 32,
    "gradient_checkpointing_every": 1,
    "shard_cache_gb": 100.0,
}
"""Values of options that are not given (None), where they have an effect; elsewhere they stay None."""
ADAMW_DEFAULTS: dict[str, Any] = {"learning_rate": 1e-4, "weight_decay": 0.01}
"""Likewise, for the optimizer that is used when none is named; another one's own defaults hold."""


def has_effect(config: Any, name: str) -> bool:
    """Whether the option does anything in this configuration."""
    return all(effect.when(config) for effect in EFFECTS.get(name, ()))


def without_effect(config: Any, names: Iterable[str]) -> Iterator[tuple[str, Effect]]:
    """Those of the options that do nothing in this configuration, each with why."""
    for name in names:
        failing = next((effect for effect in EFFECTS.get(name, ()) if not effect.when(config)), None)
        if failing is not None:
            yield name, failing


def check_effects(config: Any) -> None:
    """Raise ConfigError naming each option that is given and could do nothing, unless that is only noted."""
    given = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    reasons: dict[str, list[str]] = {}
    for name, effect in without_effect(config, given):
        if not effect.noted:
            reasons.setdefault(effect.reason, []).append(name)
    if reasons:
        found = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        raise ConfigError(f"an option would have no effect: {found}")


def resolve_defaults(config: Any) -> None:
    """Set the options that are not given to their defaults, where they have an effect."""
    defaults = {**DEFAULTS, **(ADAMW_DEFAULTS if config.customized_optimizer is None else {})}
    for name, value in defaults.items():
        if getattr(config, name) is None and has_effect(config, name):
            object.__setattr__(config, name, value)
