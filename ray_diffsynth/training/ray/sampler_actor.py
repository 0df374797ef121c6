"""The process that makes sample images. Nothing that reads the environment is imported before the actor is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray

from ray_diffsynth.cluster.environment import Parcel
from ray_diffsynth.data.warnings import DataWarnings, collecting


@ray.remote
class SamplerActor:
    """`ImageSampler` in a process of its own, which loads the model by the first call; a failure ends only the images.

    what: a `TrainPlan` and its `SamplePrompt`s. start: make those of step 0 before all others. collector: gets the
    message of a failure.
    """

    def __init__(self, what: Parcel, start: bool, collector: Any) -> None:
        self._plan, self._samples = what.value
        self._start, self._collector = start, collector
        self._sampler: Any = None
        self._warned = DataWarnings()
        self._drawn: list[str] = []
        self._error: str | None = None

    def placed(self) -> None:
        """Answers once the actor is there."""

    def begin(self) -> None:
        """Load the model now and make the images of step 0, if they are to be made: no step has to ask for its own."""
        if self._start:
            self._attempt(0, self._ready)

    def draw(self, step: int, weights: Mapping[str, Any]) -> None:
        import torch

        def make() -> None:
            tensors = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
            self._drawn.append(self._ready().draw(step, tensors))

        self._attempt(step, make)

    def _ready(self) -> Any:
        import torch

        from ray_diffsynth.training.report.sample_images import ImageSampler

        if self._sampler is None:
            device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
            sampler = ImageSampler(self._plan, self._samples, device)
            if self._start:  # here, as calls of the driver and of a worker come in any order, and a step's weights stay
                self._drawn.append(sampler.draw(0, {}))
            self._sampler = sampler
        return self._sampler

    def _attempt(self, step: int, make: Callable[[], object]) -> None:
        if self._error is not None:
            return
        try:
            with collecting() as found:
                make()
            known = set(self._warned)
            if new := DataWarnings(warning for warning in found if warning not in known):
                self._warned.merge(new)
                ray.get(self._collector.warn.remote(new.rows()))
        except Exception as error:  # training goes on
            self._error = f"step {step}: {type(error).__name__}: {error}"
            ray.get(self._collector.log.remote(f"the sample images ended early: {self._error}"))

    def finish(self) -> list[str]:
        """Files that were made; waits for the images that were asked for before."""
        return self._drawn
