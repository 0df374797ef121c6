"""How many workers a run has now, and when it should have another number."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_diffsynth.cluster.nodes import room
from ray_diffsynth.cluster.session import ClusterError, joined_cluster
from ray_diffsynth.cluster.workers import WorkerGroup
from ray_diffsynth.ray_compat import available_resources, draining_nodes

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 20.0
"""A node that has not run an empty task in this time is taken for lost, though Ray may not have noticed yet."""
WAIT_SECONDS = 1800.0
"""How long a run waits for nodes before it gives up."""
POLL_SECONDS = 2.0
SETTLE_SECONDS = 10.0
"""How long a run waits for what the group before it held, before it takes what is there."""


def nodes() -> dict[str, Mapping[str, float]]:
    """Resources of the nodes that are alive and are not being taken away, by id."""
    return joined_cluster().staying


def free(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """What nobody holds of those nodes' resources."""
    left: Mapping[str, dict[str, float]] = available_resources()
    return {node: left.get(node, {}) for node in found}


def answering(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Those of the nodes on which a task runs: after a crash Ray still lists a node that is gone for a while."""
    tasks = {
        _nothing.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in found
    }
    done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=ANSWER_SECONDS)
    there: dict[str, dict[str, float]] = {}
    for task in done:
        try:
            ray.get(task)
        except ray.exceptions.RayError as error:
            logger.debug("node %s does not answer: %s", tasks[task], error)
            continue
        there[tasks[task]] = dict(found[tasks[task]])
    return there


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _nothing() -> None:
    """Ends."""


def wait_for_room(
    group: WorkerGroup, stopped: Callable[[], bool], *, ask: bool = True, seconds: float = WAIT_SECONDS
) -> int:
    """How many workers to start, as soon as there is room for the least; 0 if `stopped`. Raises ClusterError.

    What others hold is no room. For a moment it waits for more, which a group that has just ended may still hold.
    ask: whether nodes that are listed may be gone.
    """
    began, logged = time.monotonic(), False
    while not stopped():
        there = answering(nodes()) if ask else nodes()
        unused = free(there)
        number, possible = (group.choose(room(group.resources, found)) for found in (unused, there))
        waited = time.monotonic() - began
        if number and (number >= possible or waited > SETTLE_SECONDS):
            return number
        if waited > seconds:
            raise ClusterError(
                f"there was no room for {_missing(group, there, unused)} in {seconds / 60:g} minutes; the same command "
                "goes on when there is"
            )
        if not logged and waited > SETTLE_SECONDS:
            logger.warning("waiting for room for %s", _missing(group, there, unused))
            logged = True
        time.sleep(POLL_SECONDS / 4 if waited < SETTLE_SECONDS else POLL_SECONDS)
    return 0


def _missing(
    group: WorkerGroup, there: Mapping[str, Mapping[str, float]], unused: Mapping[str, Mapping[str, float]]
) -> str:
    """`2 workers of {'GPU': 1}: 1 would fit; free are 1 of 2 GPU on 1 nodes`"""
    amounts = [
        f"{sum(node.get(name, 0.0) for node in unused.values()):g} of "
        f"{sum(node.get(name, 0.0) for node in there.values()):g} {name}"
        for name in group.resources
    ]
    fitting = room(group.resources, unused)
    return (
        f"{group.least} workers of {dict(group.resources)}: {fitting} would fit; free are {', '.join(amounts)} on "
        f"{len(there)} nodes"
    )


class Watch:
    """While the workers run: asks them to save and end when the group should change, or when the run should stop.

    terminated: the run was asked to end (SIGTERM). regroup: why it goes on with another group; None if it does not.
    """

    def __init__(self, collector: Any, group: WorkerGroup, workers: int, terminated: threading.Event) -> None:
        self.regroup: str | None = None
        self._collector, self._group, self._workers, self._terminated = collector, group, workers, terminated
        self._leaving = draining_nodes()  # known before: the group was made without them
        self._begun = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _larger(self, there: Mapping[str, Mapping[str, float]]) -> bool:
        """Whether the group's workers and the room that is left make a larger one."""
        return self._group.choose(self._workers + room(self._group.resources, free(there))) > self._workers

    def _started(self) -> bool:
        """Before it has, what is free may be what it will hold."""
        self._begun = self._begun or bool(ray.get(self._collector.has_begun.remote()))
        return self._begun

    def _run(self) -> None:
        larger = 0
        looked = time.monotonic()
        while not self._end.wait(0.2):
            if self._terminated.is_set():
                self._collector.request_stop.remote()
                return
            if time.monotonic() - looked < POLL_SECONDS:
                continue
            looked = time.monotonic()
            if draining_nodes() - self._leaving:
                self.regroup = "a node is being taken away"
            elif self._group.elastic and self._started() and self._larger(nodes()):
                larger += 1
                # A node that has just come may still be starting, and one that is gone is listed for a while: ask.
                if larger >= 2 and self._larger(answering(nodes())):
                    self.regroup = "there is room for more workers"
            else:
                larger = 0
            if self.regroup is not None:
                self._collector.request_stop.remote()
                return
