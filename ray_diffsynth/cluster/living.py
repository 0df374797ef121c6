"""Which machines of the cluster still live, for certain: Ray reports a dead one seconds to a minute late."""

import logging
import time
from collections.abc import Iterable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_diffsynth.cluster.joined import alive_nodes

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 180.0
"""How long a machine may neither answer nor be declared dead. By its defaults Ray needs about a minute at most."""
_LOOK_SECONDS = 1.0


def _answer() -> None:
    """Runs on the machine that it is sent to, whose raylet thus lives."""


def living(nodes: Iterable[str], seconds: float = SETTLE_SECONDS) -> set[str]:
    """Those of the machines (ids) that live: each is waited for until it answers or Ray declares it dead.

    One that does neither within `seconds` does not count as living, with a warning.
    """
    own = ray.get_runtime_context().get_node_id()
    unknown = set(nodes)
    alive = unknown & {own}  # this process would have ended with it
    unknown -= alive
    task = ray.remote(num_cpus=0, max_retries=0)(_answer)
    deadline = time.monotonic() + seconds
    asked: dict[Any, str] = {}
    while unknown := unknown & alive_nodes().keys():
        for node in unknown - set(asked.values()):
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            asked[task.options(scheduling_strategy=where).remote()] = node
        done, _ = ray.wait(list(asked), timeout=_LOOK_SECONDS)
        for reference in done:
            node = asked.pop(reference)
            if _succeeded(reference):
                alive.add(node)
                unknown.discard(node)
            elif node in unknown:
                time.sleep(_LOOK_SECONDS)  # it is asked again
        if unknown and time.monotonic() > deadline:
            logger.warning(
                "%d machines neither answer nor are declared dead within %.0f s; they are taken for dead: %s",
                *(len(unknown), seconds, ", ".join(sorted(unknown))),
            )
            break
    for reference in asked:
        ray.cancel(reference, force=True)
    return alive


def _succeeded(reference: Any) -> bool:
    try:
        ray.get(reference, timeout=0)
    except (RayError, GetTimeoutError) as error:
        logger.debug("a machine did not answer: %s", error)
        return False
    return True
