"""What a job wants, told to the cluster's autoscaler for as long as it waits for it."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ray_diffsynth.cluster.demand import Demand
from ray_diffsynth.cluster.joined import joined_cluster
from ray_diffsynth.ray_compat import autoscaler, autoscaling_coordinator

logger = logging.getLogger(__name__)

EXPIRE_SECONDS = 60.0
"""A request ends by itself so long after its job last repeated it: a killed job keeps no machine."""
RENEW_SECONDS = 15.0
STILL_RENEWALS = 2
"""Renewals without a machine that starts after which less is asked for."""
RETRY_RENEWALS = 20
"""Renewals after which all is asked for again."""
_SMALLEST_SHARE = 0.05
ANSWER_SECONDS = 30.0
"""How long the actor that collects the requests may take."""


class Requester:
    """The requests of one job. A job that is run again has the same name, and takes over what the killed one asked for.

    Ray reserves for a requester what it asks for, so a request is taken back before a dataset is run that is to have
    the machines. Training workers are placed by other means; beside them a request may stay, so that more come.

    The autoscaler takes the sum of all requests whole or not at all: one for more machines than there may be keeps
    every job waiting. So what is wanted beyond the least is halved while nothing starts, and wanted again later.
    """

    def __init__(self, name: str) -> None:
        self._id = f"ray_diffsynth-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        self._wanted: Demand | None = None
        self._share = 1.0
        self._still = self._renewals = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def ask(self, demand: Demand) -> None:
        """Want this, in place of what was wanted before; it is sent when it changes, and again before it expires."""
        with self._lock:
            if demand == self._wanted:
                return
            self._wanted, self._share, self._still, self._renewals = demand, 1.0, 0, 0
            self._send(demand)
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="autoscaler-request", daemon=True)
            self._thread.start()

    def cancel(self) -> None:
        """Want nothing any more."""
        with self._lock:
            if self._wanted is None:
                return
            self._wanted = None
            try:
                ray.get(autoscaling_coordinator().cancel_request.remote(self._id), timeout=ANSWER_SECONDS)
            except ray.exceptions.RayError as error:  # GetTimeoutError is one
                logger.warning("the request for machines ends by itself in %g s: %s", EXPIRE_SECONDS, error)

    def close(self) -> None:
        """Take back what is wanted, and end."""
        self._ended.set()
        self.cancel()

    def _send(self, demand: Demand) -> None:
        try:
            ray.get(
                autoscaling_coordinator().request_resources.remote(
                    requester_id=self._id,
                    resources=demand.bundles(),
                    label_selectors=demand.selectors(),
                    expire_after_s=EXPIRE_SECONDS,
                ),
                timeout=ANSWER_SECONDS,
            )
        except ray.exceptions.RayError as error:
            logger.warning("the autoscaler could not be asked for machines, which is tried again: %s", error)

    def renew(self) -> None:
        """Repeat what is wanted; less of it if none of it starts."""
        with self._lock:
            if self._wanted is None:
                return
            self._renewals += 1
            if self._renewals % RETRY_RENEWALS == 0:  # there may be room in the cloud again
                self._share, self._still = 1.0, 0
            else:
                self._adjust(self._wanted)
            self._send(self._wanted.reduced(self._share))

    def _adjust(self, wanted: Demand) -> None:
        state = autoscaler()
        moving = state is not None and bool(state.starting)
        if moving or not wanted.reduced(self._share).missing(joined_cluster()):
            self._still = 0
            return
        self._still += 1
        if self._still >= STILL_RENEWALS:
            self._share, self._still = (self._share / 2 if self._share > _SMALLEST_SHARE else 0.0), 0

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                self.renew()
            except ray.exceptions.RayError as error:
                logger.warning("what is asked of the autoscaler could not be renewed, which is tried again: %s", error)


@contextmanager
def requester(name: str) -> Iterator[Requester]:
    """A requester for the time of the block: however it ends, nothing is wanted afterwards. Within a Ray session."""
    found = Requester(name)
    try:
        yield found
    finally:
        found.close()
