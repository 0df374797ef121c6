"""`--timestep_sampling shift` draws the noise levels at which the family samples an image of the same size.

diffusers is the judge, with the scheduler configurations that the released models have.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler
from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.flux2 import DISTILLED
from ray_diffsynth.pipelines.registry import FAMILIES, get_pipeline_class
from ray_diffsynth.pipelines.shared.image_pipeline import SamplingDefaults
from ray_diffsynth.tasks import SFT

DRAWS = 1500
QWEN = {
    "use_dynamic_shifting": True,
    "shift": 1.0,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
FLUX = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@dataclass(frozen=True)
class Released:
    """A released model: its scheduler_config.json, and the module of diffusers that samples with it, in `steps`."""

    family: str
    module: str
    steps: int
    config: Mapping[str, Any]
    defaults: SamplingDefaults | None = None
    scale: int = 8  # pixels a latent
    channels: int = 16
    frames: tuple[int, ...] = ()


MODELS = {
    "FLUX.1-dev": Released("flux", "flux.pipeline_flux", 50, FLUX),
    "FLUX.1-schnell": Released("flux", "flux.pipeline_flux", 4, {"use_dynamic_shifting": False, "shift": 1.0}),
    "FLUX.2-klein-base": Released("flux2", "flux2.pipeline_flux2_klein", 50, FLUX, None, 16, 128),
    "FLUX.2-klein": Released("flux2", "flux2.pipeline_flux2_klein", 4, FLUX, DISTILLED, 16, 128),
    "Qwen-Image": Released("qwen_image", "qwenimage.pipeline_qwenimage", 50, QWEN),
    "Qwen-Image-Edit": Released("qwen_image_edit", "qwenimage.pipeline_qwenimage_edit", 50, QWEN),
    "Qwen-Image-Edit-2509": Released("qwen_image_edit_plus", "qwenimage.pipeline_qwenimage_edit_plus", 40, QWEN),
    "Z-Image-Turbo": Released("z_image", "z_image.pipeline_z_image", 8, {"shift": 3.0}),
    "Wan2.1-T2V-1.3B": Released("wan", "wan.pipeline_wan", 50, {"flow_shift": 3.0}, frames=(21,)),
    "Wan2.1-I2V-14B": Released("wan_i2v", "wan.pipeline_wan_i2v", 50, {"flow_shift": 5.0}, frames=(21,)),
}
SIZES = ((512, 512), (768, 1344), (1024, 1024), (1536, 1536))


def test_every_family_is_here() -> None:
    assert {model.family for model in MODELS.values()} == set(FAMILIES)


def their_median(model: Released, height: int, width: int) -> float:
    """The sigma half-way through the schedule by which diffusers samples an image of this size."""
    if "flow_shift" in model.config:
        unipc: Any = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, **model.config
        )
        unipc.set_timesteps(model.steps)
        return float(np.median(unipc.sigmas[:-1]))
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(model.config))
    module = importlib.import_module(f"diffusers.pipelines.{model.module}")
    tokens = (height // 16) * (width // 16)
    mu = None
    if hasattr(module, "compute_empirical_mu"):
        mu = module.compute_empirical_mu(image_seq_len=tokens, num_steps=model.steps)
    elif scheduler.config.use_dynamic_shifting:
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = module.calculate_shift(tokens, *(scheduler.config[name] for name in names))
    unshifted = np.linspace(1.0, 1 / model.steps, model.steps)
    scheduler.set_timesteps(sigmas=unshifted, mu=mu)
    return float(np.interp(0.5, unshifted[::-1], scheduler.sigmas[:-1].flip(0)))


def our_pipeline(model: Released) -> BasePipeline:
    pipe = get_pipeline_class(model.family).skeleton()
    config = {"shift": model.config["flow_shift"]} if "flow_shift" in model.config else model.config
    pipe.scheduler = FlowMatchScheduler(pipe.schedule, config=config)
    pipe.scheduler.set_timesteps(1000, training=True)
    if model.defaults is not None:
        pipe.defaults = model.defaults  # type: ignore[assignment]
    return pipe


@pytest.mark.parametrize("name", MODELS)
def test_the_median_is_that_of_sampling(name: str) -> None:
    model = MODELS[name]
    pipe = our_pipeline(model)
    keys = [SampleKey(0, 0, 0, str(number)) for number in range(DRAWS)]
    for height, width in SIZES:
        x0 = torch.empty(1, model.channels, *model.frames, height // model.scale, width // model.scale, device="meta")
        drawn = SFT(timestep_sampling="shift").timesteps(pipe, keys, x0) / 1000
        expected = their_median(model, height, width)
        assert float(drawn.median()) == pytest.approx(expected, abs=0.03), f"{name} {height}x{width}"
        assert float(drawn.min()) < 0.1 and float(drawn.max()) > 0.95  # from one end of the schedule to the other
