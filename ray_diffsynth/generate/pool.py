"""A pool of Ray actors that works through the items; one that dies is started again, and its item tried once more."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray

from ray_diffsynth.cluster.environment import Environment, Parcel
from ray_diffsynth.cluster.generators import GeneratorPool
from ray_diffsynth.cluster.session import ClusterError
from ray_diffsynth.errors import UserError
from ray_diffsynth.generate.actor import PainterActor
from ray_diffsynth.generate.items import Item
from ray_diffsynth.plan.run_plan import GeneratePlan

logger = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Items that an actor has: the one in work, and the next, so that it does not wait for the driver."""
TRIES = 2
"""Of how many actors an item must be the end before it is given up."""


@dataclass(frozen=True)
class Painted:
    """What a pool did. failures: file -> reason. seconds: from the moment that its models were loaded."""

    failures: dict[str, str]
    seconds: float


def paint_all(
    items: Sequence[Item],
    plan: GeneratePlan,
    size: GeneratorPool,
    on_done: Callable[[int], None] = lambda count: None,
    environment: Environment | None = None,
) -> Painted:
    """Make the images of all items; one that fails does not end it, a UserError does.

    on_done is called with 1 for each item that is over.
    """
    return _Pool(items, Parcel(environment, plan), size, on_done).paint()


class _Pool:
    """The actors, what each of them has, and how often each item was begun.

    An actor works in the order in which it was asked. So when it dies, its oldest item is the one to suspect, and the
    others wait as if they had never been given away. Its successor gets one item at a time: the oldest might have been
    done, and its result lost with the process that died of the next.
    """

    def __init__(
        self, items: Sequence[Item], plan: Parcel, size: GeneratorPool, on_done: Callable[[int], None]
    ) -> None:
        self._waiting = deque(items)
        self._on_done = on_done
        self._failures: dict[str, str] = {}
        self._deaths: Counter[str] = Counter()
        remote = ray.remote(**size.actor.ray_options)(PainterActor)
        self._start: Callable[[], Any] = lambda: remote.remote(plan)
        self._actors = [self._start() for _ in range(min(size.actors, len(items)))]
        self._given: list[dict[Any, Item]] = [{} for _ in self._actors]

    def paint(self) -> Painted:
        try:
            self._load()
            began = time.monotonic()
            for _ in range(IN_FLIGHT):
                for number in range(len(self._actors)):
                    self._give(number)
            while running := {task: number for number, given in enumerate(self._given) for task in given}:
                (done,), _ = ray.wait(list(running), num_returns=1)
                self._take(running[done], done)
            return Painted(self._failures, time.monotonic() - began)
        finally:
            for actor in self._actors:
                ray.kill(actor)

    def _load(self) -> None:
        """Load all models at once. Raises what loading raises, and ClusterError when a process dies of it."""
        try:
            ray.get([actor.load.remote() for actor in self._actors])
        except ray.exceptions.RayActorError as error:
            raise ClusterError(
                f"a process died while it loaded the model, probably for want of memory ({error}); lower "
                "--num_workers, or give each more by --resources"
            ) from error

    def _give(self, number: int) -> None:
        if self._waiting:
            item = self._waiting.popleft()
            self._given[number][self._actors[number].paint.remote(item)] = item

    def _take(self, number: int, task: Any) -> None:
        """What came of one task, and the next one for its actor. Raises the UserError that it raised."""
        try:
            self._settle(number, task)
        except ray.exceptions.RayActorError:
            self._replace(number)
        else:
            self._give(number)

    def _settle(self, number: int, task: Any) -> None:
        """Raises RayActorError, too, if the actor died before the task was done."""
        item = self._given[number][task]
        try:
            ray.get(task)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise
            self._fail(item, f"{type(error.cause).__name__}: {error.cause}")
        except ray.exceptions.RayActorError:
            raise
        except ray.exceptions.RayError as error:  # its error cannot be sent, or its result is lost
            self._fail(item, f"{type(error).__name__}: {' '.join(str(error).split())}")
        del self._given[number][task]
        self._on_done(1)

    def _replace(self, number: int) -> None:
        """A new actor for one that died, which tries the item that was in work once more."""
        for task in list(self._given[number]):
            with suppress(ray.exceptions.RayActorError):  # not of a result that came before the actor's end
                self._settle(number, task)
        lost = list(self._given[number].values())
        self._given[number] = {}
        if lost:
            first = lost[0]
            self._deaths[first.file] += 1
            if self._deaths[first.file] == TRIES:
                self._fail(first, "its process died each time that it was tried")
                self._on_done(1)
                lost = lost[1:]
        self._waiting.extendleft(reversed(lost))
        self._actors[number] = self._start()
        self._give(number)

    def _fail(self, item: Item, reason: str) -> None:
        self._failures[item.file] = reason
        logger.warning("%s (seed %d): %s", item.prompt, item.seed, reason)
