"""A pool of Ray actors that works through the items; one that dies is started again, and its item tried once more."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from ray_diffsynth.errors import UserError
from ray_diffsynth.generate.painter import Painter, PainterSpec
from ray_diffsynth.generate.plan import Item
from ray_diffsynth.ray_session import ClusterError, cluster_devices

logger = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Items that an actor has: the one in work, and the next, so that it does not wait for the driver."""


@dataclass(frozen=True)
class PoolSize:
    """Actors, and the Ray resources that each reserves."""

    actors: int
    cpus: float
    gpus: float
    others: dict[str, float]


def pool_size(num_workers: int, resources: dict[str, float] | None, items: int) -> PoolSize:
    """An actor per GPU, or one with all CPUs where there are none; no more than items.

    Raises ClusterError when they do not fit the cluster, which would wait for ever.
    """
    cpus, gpus = cluster_devices()
    others = dict(resources or {})
    gpu = others.pop("GPU", 1.0 if gpus >= 1 else 0.0)
    actors = min(num_workers or (max(1, int(gpus // gpu)) if gpu else 1), max(items, 1))
    cpu = others.pop("CPU", 1.0 if gpu else max(1.0, cpus // actors))
    if actors * gpu > gpus or actors * cpu > cpus:
        raise ClusterError(
            f"{actors} actors of {cpu:g} CPU and {gpu:g} GPU do not fit a cluster of {cpus:g} CPU and {gpus:g} GPU; "
            "lower --num_workers or --resources"
        )
    return PoolSize(actors, cpu, gpu, others)


class PainterActor:
    """`Painter` in an actor. The model is loaded by the first call, so that its errors are those of a call."""

    def __init__(self, spec: PainterSpec) -> None:
        self.spec = spec
        self._painter: Painter | None = None

    def load(self) -> None:
        if self._painter is None:
            self._painter = Painter(self.spec)

    def paint(self, item: Item) -> str:
        self.load()
        assert self._painter is not None
        try:
            return self._painter(item)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise


def paint_all(
    items: Sequence[Item], spec: PainterSpec, size: PoolSize, on_done: Callable[[int], None] = lambda count: None
) -> dict[str, str]:
    """Make the pictures of all items; returns file -> reason of those that failed. A UserError ends it.

    on_done is called with 1 for each item that is over.
    """
    remote = ray.remote(
        num_cpus=size.cpus, num_gpus=size.gpus, resources=size.others or None, max_restarts=-1, max_task_retries=1
    )(PainterActor)
    actors = [remote.remote(spec) for _ in range(min(size.actors, len(items)))]
    failures: dict[str, str] = {}
    waiting = deque(items)
    running: dict[Any, tuple[Any, Item]] = {}

    def submit(actor: Any) -> None:
        if waiting:
            item = waiting.popleft()
            running[actor.paint.remote(item)] = (actor, item)

    try:
        ray.get([actor.load.remote() for actor in actors])
        for _ in range(IN_FLIGHT):
            for actor in actors:
                submit(actor)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, item = running.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayActorError:
                failures[item.file] = "its process died each time that it was tried"
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, UserError):
                    raise
                failures[item.file] = f"{type(cause).__name__}: {cause}"
            if item.file in failures:
                logger.warning("%s (seed %d): %s", item.prompt, item.seed, failures[item.file])
            on_done(1)
            submit(actor)
    finally:
        for actor in actors:
            ray.kill(actor)
    return failures
