"""Sampling: the noise, the schedule, and the loop from one to the other end of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ray_diffsynth.diffusion.flow_match import NUM_TRAIN_TIMESTEPS, FlowMatchScheduler
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.model_call import ModelCall
from ray_diffsynth.pipelines.core.runner import run_units
from ray_diffsynth.pipelines.core.state import UnitState
from ray_diffsynth.pipelines.core.unit import missing_input

ProgressBar: TypeAlias = Callable[[Iterable[Tensor]], Iterable[Tensor]]
"""Wraps the timesteps of a loop, e.g. tqdm."""


def no_progress_bar(timesteps: Iterable[Tensor]) -> Iterable[Tensor]:
    """The timesteps as they are."""
    return timesteps


def check_output_type(output_type: str) -> None:
    """Raise PipelineError for an `output_type` that `__call__` does not know."""
    if output_type not in ("pil", "latent"):
        raise PipelineError(f"output_type={output_type!r} is unknown; use 'pil' or 'latent'")


class Sampling(ModelCall):
    """What `__call__` of the families, and a task that samples as they do, are made of."""

    def generate_noise(
        self,
        shape: Sequence[int],
        seed: int | None = None,
        rand_device: str | torch.device = "cpu",
        rand_torch_dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Gaussian noise of `shape`, by the seed; without one it differs each time (no global generator is used)."""
        generator = torch.Generator(rand_device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        noise = torch.randn(tuple(shape), generator=generator, device=rand_device, dtype=rand_torch_dtype)
        return noise.to(device=device or self.device, dtype=torch_dtype or self.torch_dtype)

    def initial_noise(self, shape: Sequence[int], seed: int | None, rand_device: str = "cpu") -> Tensor:
        """The noise that `__call__` starts from; direct distillation starts from it again."""
        return self.generate_noise(shape, seed, rand_device, rand_torch_dtype=self.torch_dtype)

    def sampling_schedule(self, latents: Tensor, num_inference_steps: int) -> FlowMatchScheduler:
        """The schedule by which `__call__` samples `latents` in so many steps; `self.scheduler` stays as it is.

        A family whose schedule depends on the number of tokens overrides it.
        """
        schedule = FlowMatchScheduler(self.schedule, config=self.scheduler.config)
        schedule.set_timesteps(num_inference_steps)
        return schedule

    def shifted_schedule(self, latents: Tensor) -> FlowMatchScheduler:
        """The 1000 timesteps that `--timestep_sampling shift` draws from: those at which `latents` are sampled.

        A family whose shift depends on the number of steps overrides it, with the number that it samples in.
        """
        return self.sampling_schedule(latents, NUM_TRAIN_TIMESTEPS)

    def step(
        self, scheduler: FlowMatchScheduler, latents: Tensor, progress_id: int, noise_pred: Tensor, **others: Any
    ) -> Tensor:
        """One sampling step, DiffSynth-Studio's helper; `others` (the rest of the shared inputs) are not used."""
        return scheduler.step(noise_pred, scheduler.timesteps[progress_id], latents)

    def denoise(
        self,
        schedule: FlowMatchScheduler,
        latents: Tensor,
        posi: Mapping[str, Any],
        nega: Mapping[str, Any],
        cfg_scale: float = 1.0,
        *,
        progress_bar_cmd: ProgressBar = no_progress_bar,
    ) -> Tensor:
        """`latents` (B, ...) after all steps of `schedule`, in their dtype: the sampling loop of every family.

        Gradients flow through all steps, if the caller has them enabled. An iterable of `progress_bar_cmd` that ends
        early ends the loop.

        Args:
            posi: what `model_fn` reads beside `latents` and `timestep`, of B samples.
            nega: the same of the negative side; not read if `cfg_scale` is 1.
        """
        for index, timestep in enumerate(progress_bar_cmd(schedule.timesteps)):
            now = {"latents": latents.to(self.torch_dtype), "timestep": timestep.expand(len(latents)).to(self.device)}
            prediction = self.guided_prediction({**posi, **now}, {**nega, **now}, cfg_scale)
            latents = self.step(schedule, latents, index, prediction)
        return latents

    def sample_latents(self, start: UnitState, *, progress_bar_cmd: ProgressBar = no_progress_bar) -> Tensor:
        """Latents of one sample, (1, ...): `units` run on `start`, then `denoise` by `self.scheduler` from `latents`.

        `start` holds what the units read, `cfg_scale` among it; `scheduler` has the timesteps that are wanted. Raises
        as `run_units`, and MissingInputError where no unit has written `latents`.
        """
        (state,) = run_units(self.units, self, [start])
        posi, nega = self.collate([state.flat()]), self.collate([state.flat_nega()])
        if "latents" not in posi:
            raise missing_input("sampling", "latents", self)
        return self.denoise(
            self.scheduler, posi["latents"], posi, nega, start.shared["cfg_scale"], progress_bar_cmd=progress_bar_cmd
        )
