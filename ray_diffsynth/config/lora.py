"""The LoRA: its size, its layers, what it starts from, its file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ray_diffsynth.config.effects import LORA, needs
from ray_diffsynth.config.model import TrainedModelsConfig
from ray_diffsynth.config.options import option, set_option, split_names
from ray_diffsynth.errors import ConfigError, did_you_mean


def _by_model(targets: str | None) -> dict[str, str] | None:
    """``"dit=to_q,to_k;text_encoder=q_proj"`` as a mapping; None for a list without model names."""
    parts = re.split(r";(?=[\w.]+=)", targets or "")
    pairs = [re.fullmatch(r"\s*([\w.]+)=(.*)", part, re.DOTALL) for part in parts]
    return {pair[1]: pair[2].strip(" ;") for pair in pairs if pair} if all(pairs) else None


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TrainedModelsConfig):
    """The LoRA of each model in ``lora_base_model``."""

    section = "lora"
    title = "LoRA"

    lora_target_modules: str | None = option(None, many=",", effects=(LORA,))
    """Comma-separated layer names that get a LoRA, or re:<regular expression>; the family's list when not given. For
    several models dit=to_q,to_k;text_encoder=q_proj,v_proj."""
    lora_rank: int | None = option(None, least=1, used_as=32, effects=(LORA,))
    """Rank of the LoRA; 32 when not given."""
    lora_alpha: float | None = option(None, least=0.0, effects=(LORA,))
    """Scale of the LoRA times its rank; the rank itself when not given."""
    lora_checkpoint: str | None = option(None, many=",", identity=False, effects=(LORA,))
    """LoRA file whose weights the training starts from; one for each of several lora_base_model, with commas."""
    lora_dropout: float = option(0.0, below=1, effects=(LORA,))
    """Dropout before the LoRA."""
    use_rslora: bool = option(False, effects=(LORA,))
    """Scale the LoRA by lora_alpha / sqrt(lora_rank) instead of lora_alpha / lora_rank (rsLoRA)."""
    use_dora: bool = option(False, effects=(LORA,))
    """Train the magnitudes of the weights too (DoRA)."""
    lora_format: Literal["family", "diffusers"] = option("family", identity=False, effects=(LORA,))
    """Keys of the LoRA file: those that diffusers, ComfyUI and DiffSynth-Studio all load, or diffusers' own names,
    which a DoRA always has."""
    preset_lora_path: str | None = option(None, group="Model")
    """LoRA file that is fused into the frozen base before training."""
    preset_lora_model: str | None = option(None, group="Model", effects=(needs("preset_lora_path"),))
    """Model that preset_lora_path is fused into; lora_base_model when not given."""

    def resolve(self) -> None:
        """What is fused into the base goes where the LoRA is."""
        if self.preset_lora_path and not self.preset_lora_model:
            set_option(self, preset_lora_model=(*self.lora_models, "dit")[0])

    def check(self) -> None:
        """Raise ConfigError for LoRAs that contradict each other or train nothing."""
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ConfigError(f"lora_alpha={self.lora_alpha} switches the LoRA off; use a number above 0")
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

    def target_modules_of(self, model: str) -> str | None:
        """What ``lora_target_modules`` says of one model; None when that is the family's list."""
        own = _by_model(self.lora_target_modules)
        return self.lora_target_modules if own is None else own.get(model)

    @property
    def lora_checkpoints(self) -> dict[str, str]:
        """``lora_checkpoint`` by model; the path itself when there is one model, whatever characters it has."""
        one = len(self.lora_models) == 1
        paths = (self.lora_checkpoint,) if one and self.lora_checkpoint else split_names(self.lora_checkpoint)
        return dict(zip(self.lora_models, paths, strict=bool(paths)))
