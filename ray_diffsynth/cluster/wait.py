"""Waiting for the machines that a job wants, and saying so."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from ray_diffsynth.cluster.address import ClusterError
from ray_diffsynth.cluster.demand import Ask, Demand, Shortage
from ray_diffsynth.cluster.joined import joined_cluster
from ray_diffsynth.cluster.nodes import Cluster
from ray_diffsynth.cluster.request import Requester
from ray_diffsynth.ray_compat import Autoscaler, autoscaler, available_resources

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 1.0
QUIET_SECONDS = 5.0
"""How long nothing is said: what ended a moment ago may still hold its machines."""
REPEAT_SECONDS = 60.0
"""How often it is said again that nothing has changed."""


def unused(cluster: Cluster) -> Cluster:
    """The same machines with what nobody holds of their resources."""
    left = available_resources()
    return replace(cluster, nodes={node: left.get(node, {}) for node in cluster.nodes})


def shortage_of(
    missing: Sequence[tuple[Ask, int]], cluster: Cluster, free: Cluster, scaling: Autoscaler | None
) -> Shortage:
    """What is missing, with what the autoscaler says, if there is one. free: the cluster as `unused` gives it."""
    state = scaling or Autoscaler()
    return Shortage(missing, cluster, free, state.starting, state.failed)


class Waiting:
    """One wait of a job: says what is missing when that changes and once a minute, and has an end."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._began, self._spoke = time.monotonic(), 0.0
        self._said = ""

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self._began

    def say(self, shortage: Shortage) -> None:
        """Raise ClusterError with what is missing when it has lasted too long."""
        waited = self.seconds
        if waited >= self._minutes * 60:
            raise ClusterError(
                f"after {self._minutes:g} minutes there is still no room for {shortage}; the same command goes on "
                "where this one ended. --wait_minutes sets how long to wait"
            )
        text = str(shortage)
        if waited >= QUIET_SECONDS and (text != self._said or waited - self._spoke >= REPEAT_SECONDS):
            why = "others have the machines" if shortage.busy else "waiting for machines"
            logger.warning("%s for %.0f s (at most %g min): %s", why, waited, self._minutes, text)
            self._said, self._spoke = text, waited


def wait_for(
    demand: Demand, requester: Requester, *, minutes: float, stopped: Callable[[], bool] = lambda: False
) -> bool:
    """Ask the autoscaler for all that is wanted, and wait until the least of it has room; False if `stopped`.

    Raises ClusterError when it has no room after so many minutes; at once where the cluster has no autoscaler and its
    machines would not do if they were free. The request stays: the caller takes it back.
    """
    waiting = Waiting(minutes)
    while not stopped():
        cluster = joined_cluster()
        free = unused(cluster)
        missing = demand.missing(free)
        if not missing:
            return True
        scaling = autoscaler()
        shortage = shortage_of(missing, cluster, free, scaling)
        if scaling is None and not shortage.busy:
            raise ClusterError(
                f"the cluster is too small and has no autoscaler: {shortage}; add machines, or lower --num_workers or "
                "--resources"
            )
        if scaling is not None:
            requester.ask(demand)
        waiting.say(shortage)
        time.sleep(POLL_SECONDS)
    return False


def sized_when_there(
    size: Callable[[Cluster], T], demand: Callable[[T], Demand], requester: Requester, *, minutes: float
) -> T:
    """What `size` makes of the cluster, once that has room for the least of its `demand`, by what is there then.

    The request is taken back: the actors are the demand from then on. Raises ClusterError as `wait_for`.
    """
    wait_for(demand(size(joined_cluster())), requester, minutes=minutes)
    found = size(joined_cluster())
    requester.cancel()
    return found
