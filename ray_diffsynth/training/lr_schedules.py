"""The course of the learning rate over a run: a pure function of the step, so that resume needs no state for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Factor = Callable[[int], float]
"""Optimizer step (from 0) -> what the learning rate is multiplied by."""


@dataclass(frozen=True)
class LrSchedule:
    """make: (steps of warm-up, steps of the run, the learning rate itself) -> factor of each step.

    depends_on_length: whether a step's factor depends on how many steps the run has.
    """

    make: Callable[[int, int, float], Factor]
    depends_on_length: bool = True


def constant(warmup: int, total: int, rate: float) -> Factor:
    """1 at every step."""
    return lambda step: 1.0


def of_diffusers(name: str) -> Callable[[int, int, float], Factor]:
    """A schedule of `diffusers.optimization.get_scheduler`."""

    def make(warmup: int, total: int, rate: float) -> Factor:
        import torch
        from diffusers.optimization import get_scheduler

        # It wants an optimizer, of which the polynomial alone takes something: the rate, as it ends at 1e-7.
        holder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        (factor,) = get_scheduler(name, holder, num_warmup_steps=warmup, num_training_steps=total).lr_lambdas
        return lambda step: float(factor(step))

    return make


LR_SCHEDULES: dict[str, LrSchedule] = {
    "constant": LrSchedule(constant, depends_on_length=False),
    "constant_with_warmup": LrSchedule(of_diffusers("constant_with_warmup"), depends_on_length=False),
    "linear": LrSchedule(of_diffusers("linear")),
    "cosine": LrSchedule(of_diffusers("cosine")),
    "cosine_with_restarts": LrSchedule(of_diffusers("cosine_with_restarts")),
    "polynomial": LrSchedule(of_diffusers("polynomial")),
}
"""By the name that ``--lr_scheduler`` takes."""
