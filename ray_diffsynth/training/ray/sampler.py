"""The actor that makes a run's sample images: where it is, from its start to the last image."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from ray_diffsynth.cluster.demand import Ask
from ray_diffsynth.cluster.environment import Environment, Parcel
from ray_diffsynth.cluster.joined import joined_cluster
from ray_diffsynth.cluster.nodes import Process
from ray_diffsynth.cluster.workers import WorkerGroup, sampler_process
from ray_diffsynth.errors import first_line
from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.training.checkpoint import list_checkpoints
from ray_diffsynth.training.ray.sampler_actor import SamplerActor
from ray_diffsynth.training.report.sample_grids import GridInfo, is_drawn
from ray_diffsynth.training.report.sample_prompts import SamplePrompt

logger = logging.getLogger(__name__)


class Sampling:
    """The actor that makes a run's sample images, if there is one; otherwise the workers draw.

    actor: its handle. of_workers: the images that the workers draw. placed: what the actor reserves, as part of what
    the run wants of the cluster.
    """

    def __init__(
        self, plan: TrainPlan, samples: list[SamplePrompt], collector: Any, environment: Environment | None = None
    ) -> None:
        self._environment = environment
        self.actor: Any = None
        self.of_workers: list[SamplePrompt] = []
        self.placed: list[Ask] = []
        self._plan, self._samples, self._collector = plan, samples, collector
        self._begun = not samples

    def beside(self, group: WorkerGroup) -> list[Ask]:
        """What must have room beside the workers, before the actor has its place."""
        if self._begun or self._plan.config.sample_resources is None:
            return []
        return _asks(sampler_process(self._plan.config, group, joined_cluster()))

    def begin(self, group: WorkerGroup, stopped: Callable[[], bool]) -> bool:
        """Start the actor, once there is room for the workers; True if it took some, so that this is to be asked again.

        Waits until it has its place, unless `stopped`.
        """
        if self._begun:
            return False
        self._begun = True
        process = sampler_process(self._plan.config, group, joined_cluster())
        if process is None:
            logger.info("no GPU is left for the sample images: the workers draw them between steps, which takes time")
            self.of_workers = self._samples
            return False
        self.placed = _asks(process)
        self.actor = self._start(process)
        if self.placed:
            ready = self.actor.placed.remote()
            while not stopped() and not ray.wait([ready], timeout=1.0)[0]:
                logger.debug("the actor that makes sample images has no place yet")
        self.actor.begin.remote()  # beside the start of the workers
        return bool(self.placed)

    def _start(self, process: Process) -> Any:
        plan = self._plan
        options = SamplerActor.options(**process.ray_options)  # type: ignore[attr-defined]
        fresh = not list_checkpoints(plan.output_path)
        start = fresh or not is_drawn(plan.output_path, 0, GridInfo.of(plan.config, self._samples, 0))
        if not start:  # all that it draws comes with the weights of a step
            plan = replace(plan, config=replace(plan.config, lora_checkpoint=None))
        return options.remote(Parcel(self._environment, (plan, self._samples)), start, self._collector)

    def end(self, *, finished: bool) -> None:
        """End the actor; first wait for the last images of a run that has `finished`."""
        if self.actor is None:
            return
        if finished:
            try:
                ray.get(self.actor.finish.remote())
            except ray.exceptions.RayError as lost:  # what goes wrong with an image the actor logs itself
                logger.warning("the sample images ended early: %s", first_line(lost))
        ray.kill(self.actor)


def _asks(process: Process | None) -> list[Ask]:
    """None for a process that reserves nothing."""
    if process is None or not process.reserved:
        return []
    return [Ask("actors that make sample images", process, 1, 1)]
