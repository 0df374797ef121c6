"""The unit after noise and encoder, the same for images and videos."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.unit import PipelineUnit, missing_input


class FlowMatchUnit_InitialLatents(PipelineUnit):
    """What sampling starts from: noise, or the noised `input_latents`. In training the loss makes the noisy latents."""

    version = 1

    def __init__(self) -> None:
        super().__init__(input_params=("noise", "input_latents"), output_params=("latents",))

    def process(
        self, pipe: BasePipeline, noise: Tensor | None = None, input_latents: Tensor | None = None
    ) -> dict[str, Any]:
        if pipe.scheduler.training:
            return {}
        if noise is None:
            raise missing_input(type(self).__name__, "noise", pipe, before=self)
        if input_latents is None:
            return {"latents": noise}
        clean = input_latents.to(noise.dtype)
        return {"latents": pipe.scheduler.add_noise(clean, noise, timestep=pipe.scheduler.timesteps[0])}
