"""Direct distillation of every family: its student samples exactly as the family's own `__call__` does."""

from __future__ import annotations

from typing import Any

import torch

from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.tasks import DirectDistill
from ray_diffsynth.tasks.direct_distill import sample
from ray_diffsynth.training.module import DiffusionTrainingModule
from tests.families.cases import FamilyCase

STUDENT = {"seed": 7, "rand_device": "cpu", "num_inference_steps": 3, "cfg_scale": 1.0}


def test_the_student_samples_as_the_family_does(case: FamilyCase, pipe: BasePipeline) -> None:
    asked = {**case.samplings[0].ours, "cfg_scale": 1.0, "num_inference_steps": 3}
    asked.pop("embedded_guidance", None)  # the family's own
    expected: torch.Tensor = pipe(**asked, seed=7, output_type="latent")
    pipe.scheduler.set_timesteps(1000, training=True)
    row: dict[str, Any] = {**case.inputs(0), **STUDENT}
    row |= {name: asked[name] for name in row if name in asked}
    module = DiffusionTrainingModule(pipe, DirectDistill(), trained=["dit"], inputs=tuple(row), split=False)
    module.settings.update(case.settings)
    with torch.no_grad():
        batch = module.batch_of([row])
        noise = DirectDistill().noise(pipe, batch)
        latents, sigma = sample(pipe, batch, noise, 3)
        loss = module([row], [SampleKey(0, 0, 0, "a")]).loss
    assert latents.shape == batch["input_latents"].shape == expected.shape
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)
    assert float(sigma) == 1.0 and float(loss) > 0
