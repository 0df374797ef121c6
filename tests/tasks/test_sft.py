"""The flow-matching loss: its formula, its keys, and the names of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler
from ray_diffsynth.diffusion.loss_weighting import LOSS_WEIGHTINGS
from ray_diffsynth.diffusion.randomness import SampleKey, sample_noise
from ray_diffsynth.tasks import SFT, get_task, task_family
from ray_diffsynth.tasks.registry import TaskError


class Scaled:
    """A pipeline whose model predicts `factor` times its noisy latents; it keeps what it was given."""

    def __init__(self, factor: float | torch.Tensor = 0.5) -> None:
        self.scheduler = FlowMatchScheduler("Qwen-Image")
        self.scheduler.set_timesteps(1000, training=True)
        self.torch_dtype = torch.float32
        self.factor = factor
        self.inputs: Mapping[str, Any] = {}

    def predict(self, batch: Mapping[str, Any]) -> torch.Tensor:
        self.inputs = batch
        prediction: torch.Tensor = self.factor * batch["latents"]
        return prediction


def keys(count: int, epoch: int = 0) -> list[SampleKey]:
    return [SampleKey(0, epoch, 0, f"{i}.png") for i in range(count)]


def latents(count: int) -> torch.Tensor:
    return torch.arange(count * 16, dtype=torch.float32).reshape(count, 4, 2, 2) / 16


@pytest.mark.parametrize("weighting", ["bell", "none"])
def test_formula(weighting: str) -> None:
    pipe, x0 = Scaled(), latents(3)
    output = get_task("sft:train", weighting=weighting).loss(pipe, {"input_latents": x0}, keys(3))
    for i, key in enumerate(keys(3)):
        sigma = float(output.sigma[i])
        noise = sample_noise((1, 4, 2, 2), key)[0]
        noisy = (1 - sigma) * x0[i] + sigma * noise
        expected = ((0.5 * noisy - (noise - x0[i])) ** 2).mean()
        if weighting == "bell":
            expected = expected * pipe.scheduler.training_weight(torch.tensor(sigma * 1000))[0]
        assert float(output.per_sample[i]) == pytest.approx(float(expected), rel=1e-5)
    assert float(output.loss) == pytest.approx(float(output.per_sample.mean()))
    assert set(pipe.inputs) == {"input_latents", *SFT.provides}
    assert torch.equal(pipe.inputs["timestep"] / 1000, output.sigma)


def test_no_weighting_is_a_weight_of_one_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSS_WEIGHTINGS, "ones", lambda scheduler, timestep: torch.ones_like(timestep))
    results = []
    for weighting in ("none", "ones"):
        pipe = Scaled()
        factor = pipe.factor = torch.tensor(0.5, requires_grad=True)
        output = SFT(weighting=weighting).loss(pipe, {"input_latents": latents(3)}, keys(3))
        results.append((output.per_sample, output.loss, *torch.autograd.grad(output.loss, factor)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_sample_has_its_own_noise_whatever_the_batch() -> None:
    pipe, x0, task = Scaled(), latents(4), SFT()
    together = task.loss(pipe, {"input_latents": x0}, keys(4)).per_sample
    alone = [task.loss(pipe, {"input_latents": x0[i : i + 1]}, keys(4)[i : i + 1]).loss for i in range(4)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together, task.loss(pipe, {"input_latents": x0}, keys(4, epoch=1)).per_sample)


def test_sigma_comes_from_the_schedule_between_the_boundaries() -> None:
    pipe = Scaled()
    many = SFT().timesteps(pipe, keys(400))
    assert torch.isin(many, pipe.scheduler.timesteps).all()
    assert len(many.unique()) > 250
    low = SFT(min_timestep_boundary=0.0, max_timestep_boundary=0.1).timesteps(pipe, keys(100))
    assert float(low.min()) >= float(pipe.scheduler.timesteps[99])


def test_the_model_gets_the_pipelines_dtype_and_the_loss_is_fp32() -> None:
    pipe = Scaled()
    pipe.torch_dtype = torch.bfloat16
    output = SFT().loss(pipe, {"input_latents": latents(2).bfloat16()}, keys(2))
    assert pipe.inputs["latents"].dtype is torch.bfloat16
    assert pipe.inputs["timestep"].dtype is output.loss.dtype is torch.float32


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="min_timestep_boundary=0.5.*leave no timestep"):
        SFT(min_timestep_boundary=0.5, max_timestep_boundary=0.5)
    with pytest.raises(ValueError, match="'flat' is unknown"):
        get_task("sft", weighting="flat")
    with pytest.raises(ValueError, match="1 keys for 2 samples"):
        SFT().loss(Scaled(), {"input_latents": latents(2)}, keys(1))


def test_names() -> None:
    assert [task_family(name) for name in ("sft", "sft:train", "sft:data_process")] == ["sft"] * 3
    with pytest.raises(TaskError, match="did you mean sft:train"):
        get_task("sft:trian")
