"""Which model: where it lies, which family it is of, and what it computes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ray_diffsynth.config.effects import TOKENS
from ray_diffsynth.config.options import Component, option, set_option, split_names
from ray_diffsynth.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Component):
    """The base model."""

    section = "model"
    title = "Model"

    model: str | None = option(None, identity=False)
    """Model in diffusers' layout: a local folder or a Hugging Face id."""
    model_id_with_origin_paths: str | None = option(None, identity=False, many=",")
    """DiffSynth's way to name a model: comma-separated id:pattern, e.g. Qwen/Qwen-Image:vae/*.safetensors."""
    model_paths: str | None = option(None, identity=False, json_list=True)
    """JSON list of local weight files (a list of shards counts as one entry), each beside its config.json."""
    tokenizer_path: str | None = option(None, identity=False, effects=(TOKENS,))
    """Folder of the tokenizer, when it is not the model's own."""
    processor_path: str | None = option(None, identity=False, effects=(TOKENS,))
    """Folder of the processor, when it is not the model's own."""
    family: str | None = option(None, identity=False)
    """Pipeline family, or your own by its module, my_module[:Class]; read from the model when not given."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Number format of the frozen models and of what they compute."""
    pipeline_settings: dict[str, Any] | None = None
    """Constants of the family as JSON, e.g. {"tiled": true, "max_sequence_length": 256}; see docs/families.md."""

    def check(self) -> None:
        """Raise ConfigError unless the model is named in one way."""
        if self.model and (self.model_id_with_origin_paths or self.model_paths):
            raise ConfigError(
                "model and model_id_with_origin_paths (or model_paths) are both given; use one of them, "
                "model being the short form that takes all parts of a folder or hub id"
            )
        if not (self.model or self.model_id_with_origin_paths or self.model_paths):
            raise ConfigError("model is missing; give a diffusers folder or a hub id, e.g. --model Qwen/Qwen-Image")


@dataclass(frozen=True, kw_only=True)
class TrainedModelsConfig(Component):
    """Which models are trained: it decides which units need gradients, and so what stage 1 may run."""

    section = "trained_models"
    title = "Model"

    trainable_models: str | None = option(None, many=",")
    """Comma-separated models that are trained, e.g. text_encoder; decides which units stage 1 may run."""
    lora_base_model: str | None = option(None, many=",", group="LoRA")
    """Comma-separated models that get a LoRA each, e.g. dit,text_encoder; dit unless trainable_models is given."""

    def resolve(self) -> None:
        """The denoising model gets a LoRA unless something is trained whole."""
        if self.lora_base_model is None and not split_names(self.trainable_models):
            set_option(self, lora_base_model="dit")

    @property
    def trained(self) -> tuple[str, ...]:
        """The models that need gradients: ``trainable_models`` and the one with the LoRA, each once."""
        return tuple(dict.fromkeys((*split_names(self.trainable_models), *self.lora_models)))

    @property
    def lora_models(self) -> tuple[str, ...]:
        """``lora_base_model`` as names."""
        return split_names(self.lora_base_model)
