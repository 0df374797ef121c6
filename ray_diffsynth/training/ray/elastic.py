"""How many workers a run has now, and when it should have another number."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray

from ray_diffsynth.cluster.demand import Ask
from ray_diffsynth.cluster.joined import joined_cluster
from ray_diffsynth.cluster.living import living
from ray_diffsynth.cluster.nodes import Cluster
from ray_diffsynth.cluster.request import Requester
from ray_diffsynth.cluster.wait import Waiting, shortage_of, unused
from ray_diffsynth.cluster.workers import WorkerGroup
from ray_diffsynth.ray_compat import autoscaler, draining_nodes, taken_away_nodes

ANSWER_SECONDS = 20.0
"""A node that has not run an empty task in this time is taken for lost, though Ray may not have noticed yet."""
POLL_SECONDS = 2.0
SETTLE_SECONDS = 10.0
"""How long a run waits for what the group before it held, before it takes what is there."""
GROW_SECONDS = 60.0
"""How long a run that could have more workers waits for machines that are starting, to take them together."""


def answering(cluster: Cluster) -> Cluster:
    """Those machines on which a task runs: after a crash Ray still lists a node that is gone for a while."""
    alive = living(cluster.staying, ANSWER_SECONDS)
    return replace(cluster, nodes={node: found for node, found in cluster.nodes.items() if node in alive})


def wait_for_room(
    group: WorkerGroup,
    requester: Requester,
    stopped: Callable[[], bool],
    *,
    minutes: float,
    beside: Sequence[Ask] = (),
    placed: Sequence[Ask] = (),
    ask: bool = True,
) -> int:
    """How many workers to start, as soon as there is room for the least; 0 if `stopped`. Raises ClusterError.

    What others hold is no room. For a moment it waits for more, which a group that has just ended may still hold. Where
    the cluster has an autoscaler, it is asked for all workers and for what stands beside them; the request stays.
    beside: actors that have no place yet; placed: those that have. ask: whether nodes that are listed may be gone.
    """
    waiting, demand = Waiting(minutes), group.demand(beside)
    while not stopped():
        cluster = answering(joined_cluster()) if ask else joined_cluster()
        free = unused(cluster)
        number, possible = (group.choose(group.room(machines, beside)) for machines in (free, cluster))
        if number and (number >= possible or waiting.seconds > SETTLE_SECONDS):
            return number
        scaling = autoscaler()
        if scaling is not None:
            requester.ask(group.demand([*beside, *placed]))
        if not number:
            missing = demand.missing(free) or [(demand.asks[0], group.room(free, beside))]
            waiting.say(shortage_of(missing, cluster, free, scaling))
        time.sleep(POLL_SECONDS / 4 if waiting.seconds < SETTLE_SECONDS else POLL_SECONDS)
    return 0


def ask_for_more(group: WorkerGroup, requester: Requester, workers: int, placed: Sequence[Ask]) -> None:
    """While `workers` train, for whom Ray Train asks the autoscaler itself: ask for the others of an elastic group."""
    demand = group.demand(placed, training=workers)
    if autoscaler() is None or workers == group.numbers[-1]:
        requester.cancel()
    else:
        requester.ask(demand)


class Watch:
    """While the workers run: asks them to save and end when the group should change, or when the run should stop.

    terminated: the run was asked to end (SIGTERM). regroup: why it goes on with another group; None if it does not.
    """

    def __init__(self, collector: Any, group: WorkerGroup, workers: int, terminated: threading.Event) -> None:
        self.regroup: str | None = None
        self._collector, self._group, self._workers, self._terminated = collector, group, workers, terminated
        self._nodes: frozenset[str] = frozenset()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def lost_to_notice(self) -> bool:
        """Whether a node that trained was taken away, of which the cluster knew: no fault of what it ran."""
        return bool(self._nodes & taken_away_nodes())

    def _possible(self, cluster: Cluster) -> int:
        """How many workers there could be in the place of those that train and in the room that is left."""
        return self._group.choose(self._workers + self._group.room(unused(cluster)))

    def _started(self) -> bool:
        """Whether all workers are there: before, what is free may be what they will hold."""
        if not self._nodes:
            self._nodes = frozenset(ray.get(self._collector.nodes.remote(self._workers)))
        return bool(self._nodes)

    def _run(self) -> None:
        since: float | None = None
        looked = time.monotonic()
        while not self._end.wait(0.05):
            if self._terminated.is_set():
                self._collector.request_stop.remote()
                return
            if time.monotonic() - looked < POLL_SECONDS:
                continue
            looked = time.monotonic()
            if not self._started():
                continue
            if self._nodes & draining_nodes():
                self.regroup = "a node is being taken away"
            elif self._group.elastic and self._possible(joined_cluster()) > self._workers:
                if since is None:
                    since = looked  # a node that has just come may still be starting
                elif self._should_grow(looked - since):
                    self.regroup = "there is room for more workers"
            else:
                since = None
            if self.regroup is not None:
                self._collector.request_stop.remote()
                return

    def _should_grow(self, seconds: float) -> bool:
        """Whether to start again with more workers, for which there has been room for so long."""
        if seconds < GROW_SECONDS and self._possible(joined_cluster()) < self._group.numbers[-1]:
            scaling = autoscaler()
            if scaling is not None and scaling.starting:
                return False
        return self._possible(answering(joined_cluster())) > self._workers  # one that is gone is listed for a while
