"""The sampling loop by hand; that it samples as diffusers does is in tests/families."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import MissingInputError, PipelineError
from ray_diffsynth.pipelines.core.sampling import check_output_type
from ray_diffsynth.pipelines.core.state import UnitState
from ray_diffsynth.pipelines.core.unit import PipelineUnit


class StartUnit(PipelineUnit):
    """What sampling starts from: `start` in the parameter `latents`."""

    def __init__(self) -> None:
        super().__init__(input_params=("start",), output_params=("latents",))

    def process(self, pipe: Toy, start: Tensor | None) -> dict[str, Tensor]:
        return {} if start is None else {"latents": start}


class ScaleUnit(PipelineUnit):
    """The number that a prompt stands for."""

    def __init__(self) -> None:
        super().__init__(
            seperate_cfg=True,
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            output_params=("scale",),
        )

    def process(self, pipe: Toy, prompt: float) -> dict[str, Tensor]:
        return {"scale": torch.tensor([prompt])}


class Toy(BasePipeline):
    """The velocity is the prompt's number times the latents."""

    schedule = "Wan"
    in_iteration_models = ()

    def __init__(self) -> None:
        super().__init__(torch_dtype=torch.float32)
        self.units = [StartUnit(), ScaleUnit()]
        self.model_fn = self.velocity
        self.seen: list[tuple[int, ...]] = []

    def velocity(self, *, latents: Tensor, timestep: Tensor, scale: Tensor) -> Tensor:
        self.seen.append(tuple(timestep.shape))
        return scale.reshape(-1, 1) * latents


def euler(pipe: Toy, scale: float, steps: int | None = None) -> float:
    """x <- x * (1 + (s' - s) * scale) from 1."""
    sigmas = [*pipe.scheduler.sigmas.tolist(), 0.0]
    x = 1.0
    for now, then in list(zip(sigmas, sigmas[1:], strict=False))[:steps]:
        x *= 1 + (then - now) * scale
    return x


@pytest.mark.parametrize(("cfg_scale", "combined"), [(1.0, 0.5), (3.0, 1.5)])
def test_the_loop_with_and_without_guidance(cfg_scale: float, combined: float) -> None:
    """Guidance combines 0.5 and 0: nega + cfg_scale * (posi - nega)."""
    pipe = Toy()
    pipe.scheduler.set_timesteps(4)
    start = UnitState({"start": torch.ones(1, 1), "cfg_scale": cfg_scale}, {"prompt": 0.5}, {"negative_prompt": 0.0})
    assert float(pipe.sample_latents(start)) == pytest.approx(euler(pipe, combined), rel=1e-5)
    assert len(pipe.seen) == (4 if cfg_scale == 1 else 8) and set(pipe.seen) == {(1,)}


def test_a_batch_with_gradients_and_a_progress_bar() -> None:
    pipe = Toy()
    pipe.scheduler.set_timesteps(3)
    scale = torch.tensor([0.5, 2.0], requires_grad=True)
    counted: list[float] = []

    def two_steps(timesteps: Iterable[Tensor]) -> Iterable[Tensor]:
        for timestep in list(timesteps)[:2]:
            counted.append(float(timestep))
            yield timestep

    end = pipe.denoise(pipe.scheduler, torch.ones(2, 1), {"scale": scale}, {}, progress_bar_cmd=two_steps)
    assert end[:, 0].tolist() == pytest.approx([euler(pipe, 0.5, 2), euler(pipe, 2.0, 2)], rel=1e-5)
    assert counted == pipe.scheduler.timesteps[:2].tolist() and pipe.seen == [(2,), (2,)]
    end.sum().backward()  # type: ignore[no-untyped-call]
    assert scale.grad is not None and bool((scale.grad != 0).all())


def test_what_sampling_cannot_do_is_said() -> None:
    pipe = Toy()
    pipe.scheduler.set_timesteps(2)
    start = UnitState({"start": None, "cfg_scale": 1.0}, {"prompt": 1.0}, {"negative_prompt": 0.0})
    with pytest.raises(MissingInputError, match="sampling needs 'latents', .* StartUnit should have written it"):
        pipe.sample_latents(start)
    with pytest.raises(PipelineError, match="output_type='np' is unknown; use 'pil' or 'latent'"):
        check_output_type("np")
