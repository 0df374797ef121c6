"""A family of a user's own: Qwen-Image whose prompt gets one more token, looked up by the column `style`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.pipelines.core.unit import PipelineUnit
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline

STYLES = ("plain", "neon")


class Styler(ModelMixin, ConfigMixin):
    """One vector for each style."""

    @register_to_config
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(len(STYLES), width)

    def forward(self, style: str) -> torch.Tensor:
        return self.table(torch.tensor([[STYLES.index(style)]], device=self.table.weight.device))


class StyleUnit(PipelineUnit):
    """`prompt_embeds` (1, L, D) and `style` -> `prompt_embeds` (1, L + 1, D)."""

    version = 1

    def __init__(self) -> None:
        super().__init__(
            seperate_cfg=True,
            input_params=("style",),
            input_params_posi={"prompt_embeds": "prompt_embeds"},
            input_params_nega={"prompt_embeds": "prompt_embeds"},
            output_params=("prompt_embeds",),
            onload_model_names=("styler",),
        )

    def process(self, pipe: StyledPipeline, prompt_embeds: torch.Tensor, style: str) -> dict[str, Any]:  # type: ignore[override]
        pipe.load_models_to_device(("styler",))
        return {"prompt_embeds": torch.cat([prompt_embeds, pipe.styler(style).to(prompt_embeds)], dim=1)}


class StyledPipeline(QwenImagePipeline):
    version = 1
    parts: ClassVar[Mapping[str, Part]] = {
        **QwenImagePipeline.parts,
        "styler": Part("styler", "tests.training.own_family:Styler"),
    }
    styler: Any

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.units.append(StyleUnit())
