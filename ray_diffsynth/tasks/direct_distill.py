"""Direct distillation: a student of few steps is trained to end where its teacher ended, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.tasks.base import LossOutput, TrainablePipeline
from ray_diffsynth.tasks.registry import TaskError


def _whole_number(value: Any, least: int) -> int:
    text = str(value).strip().removesuffix(".0")  # pandas writes 4.0 where a row lacks a value
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or not least <= int(text) < 2**63:
        raise ValueError(f"{value!r} is not a whole number from {least} to 2^63 - 1")
    return int(text)


def _rand_device(value: Any) -> str:
    kind, _, number = str(value).strip().partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ValueError(f"{value!r} is no device to draw noise on; write cpu or cuda")
    return kind  # a seed gives the same noise on every GPU


def _no_guidance(value: Any) -> float:
    if float(value) != 1:
        raise ValueError(
            f"it is {value}, but the student runs without guidance; write 1 (the teacher's scale is in its image)"
        )
    return 1.0


@dataclass(frozen=True)
class DirectDistill:
    """Mean squared error between the latents that the student samples and those of the teacher's image.

    DiffSynth-Studio's scheme: from the noise of the row's ``seed`` and ``rand_device``, the one that the teacher's
    image was made from, the student runs the family's sampling schedule of ``num_inference_steps`` steps without
    guidance, with gradients through all of them. The noise is the row's, so it is the same in every epoch.

    Rows of one batch may differ in their number of steps: those with equal ones run together.
    """

    name: ClassVar[str] = "direct_distill"
    reads: ClassVar[tuple[str, ...]] = ("input_latents", "seed", "rand_device", "num_inference_steps")
    provides: ClassVar[tuple[str, ...]] = ("latents", "noise", "timestep")
    columns: ClassVar[Mapping[str, Callable[[Any], Any]]] = {
        "seed": partial(_whole_number, least=0),
        "rand_device": _rand_device,
        "num_inference_steps": partial(_whole_number, least=1),
        "cfg_scale": _no_guidance,
    }
    as_sampled: ClassVar[bool] = True

    def loss(self, pipe: TrainablePipeline, batch: Mapping[str, Any], keys: Sequence[SampleKey]) -> LossOutput:
        """batch: what ``pipe.collate`` made of B samples, with lists of B for the columns; keys: B of them."""
        target = batch["input_latents"]
        if len(keys) != len(target):
            raise ValueError(f"{len(keys)} keys for {len(target)} samples: one key a sample")
        together: dict[int, list[int]] = {}
        for index, steps in enumerate(batch["num_inference_steps"]):
            together.setdefault(steps, []).append(index)
        losses: list[Tensor] = []
        sigmas: list[Tensor] = []
        for steps, indices in together.items():
            part = _rows(batch, indices, len(keys))
            noise = self.noise(pipe, part)
            latents, first_sigma = sample(pipe, part, noise, steps)
            losses.append((latents.float() - part["input_latents"].float()).square().flatten(1).mean(1))
            sigmas.append(first_sigma.expand(len(indices)))
        # Back into the order of the batch.
        order = torch.tensor([index for indices in together.values() for index in indices]).argsort()
        per_sample = torch.cat(losses)[order.to(target.device)]
        return LossOutput(per_sample.mean(), per_sample.detach(), torch.cat(sigmas)[order])

    def noise(self, pipe: TrainablePipeline, batch: Mapping[str, Any]) -> Tensor:
        """The noise (B, ...) that each row's image was made from.

        Raises TaskError for noise of a GPU on a machine without one: it is not the noise that a CPU draws.
        """
        shape = (1, *batch["input_latents"].shape[1:])
        drawn = []
        for seed, device in zip(batch["seed"], batch["rand_device"], strict=True):
            if device == "cuda" and not torch.cuda.is_available():
                raise TaskError(
                    "the column rand_device says cuda, whose noise only a GPU draws again; train on a GPU, or generate "
                    "the images with rand_device=cpu"
                )
            drawn.append(pipe.initial_noise(shape, seed, device))
        return torch.cat(drawn)


def sample(pipe: TrainablePipeline, batch: Mapping[str, Any], noise: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Latents after `steps` steps from `noise`, as the family samples them without guidance; and the first sigma."""
    schedule = pipe.sampling_schedule(noise, steps)
    return pipe.denoise(schedule, noise, {**batch, "noise": noise}, {}), schedule.sigmas[:1]


def _rows(batch: Mapping[str, Any], indices: Sequence[int], size: int) -> Mapping[str, Any]:
    """Those rows of a collated batch of `size`: tensors have them along axis 0, lists one entry each."""
    if len(indices) == size:
        return batch
    return {name: _take(value, indices, size) for name, value in batch.items()}


def _take(value: Any, indices: Sequence[int], size: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == size:
        return value[torch.tensor(indices, device=value.device)]
    if isinstance(value, list) and len(value) == size:
        return [value[index] for index in indices]
    return value
