"""The contract of a training task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler
from ray_diffsynth.diffusion.randomness import SampleKey


@dataclass(frozen=True)
class LossOutput:
    """The loss of one microbatch of B samples.

    loss: 0-d fp32, the mean of ``per_sample``; what is differentiated.
    per_sample: (B,) fp32, detached: each sample's weighted loss.
    sigma: (B,) fp32 in [0, 1]: the noise level that each sample was trained at.
    """

    loss: torch.Tensor
    per_sample: torch.Tensor
    sigma: torch.Tensor


class TrainablePipeline(Protocol):
    """What a task needs of a pipeline; ``pipelines.core.base.BasePipeline`` has it."""

    scheduler: FlowMatchScheduler
    torch_dtype: torch.dtype

    def predict(self, batch: Mapping[str, Any]) -> torch.Tensor: ...

    def initial_noise(self, shape: Sequence[int], seed: int, rand_device: str = "cpu") -> torch.Tensor: ...

    def sampling_schedule(self, latents: torch.Tensor, num_inference_steps: int) -> FlowMatchScheduler: ...

    def shifted_schedule(self, latents: torch.Tensor) -> FlowMatchScheduler: ...

    def denoise(
        self,
        schedule: FlowMatchScheduler,
        latents: torch.Tensor,
        posi: Mapping[str, Any],
        nega: Mapping[str, Any],
    ) -> torch.Tensor: ...


@runtime_checkable
class Task(Protocol):
    """What a step optimises.

    reads: names that ``loss`` takes from the batch and does not write itself, so that the cache must hold them.
    provides: names that ``loss`` gives to the model, so that the cache need not hold them.
    columns: metadata columns that every row must have, each with what reads its value (it raises ValueError, and the
        row is rejected). ``loss`` gets those that it reads as lists, one entry a sample.
    as_sampled: whether the loss runs the family's sampling loop: the model then gets the settings of sampling
        (``BasePipeline.sampling_settings``), and an image must be used in the size that it was made in.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    provides: ClassVar[tuple[str, ...]]
    columns: ClassVar[Mapping[str, Callable[[Any], Any]]]
    as_sampled: ClassVar[bool]

    def loss(self, pipe: TrainablePipeline, batch: Mapping[str, Any], keys: Sequence[SampleKey]) -> LossOutput:
        """The loss of B samples, with gradients.

        batch: what ``BasePipeline.collate`` made of them: tensors (B, ...), settings, and lists of B for ``columns``.
        keys: one a sample; all that is random is a function of them.
        """
        ...
