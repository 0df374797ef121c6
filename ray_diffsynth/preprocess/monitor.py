"""What the driver knows of the tasks while they run: an actor beside it to which they report.

The only way by which tasks report attempts, progress and why the run must end. The driver polls it while a pass runs,
and evaluates it when the pass is over. When its process is killed, Ray starts it again and it reads its journal;
meanwhile calls wait.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from ray_diffsynth.preprocess.attempts import Attempt, Stage, Unfinished
from ray_diffsynth.preprocess.monitor_state import Counts, Journal

RESTARTS = 100
"""How often a monitor is started again; one that cannot be started ends the run instead of being awaited for ever."""


@ray.remote(num_cpus=0, max_restarts=RESTARTS, max_task_retries=-1)
class Monitor:
    """Actor: a `MonitorState`, with its journal at a path of this machine, and the encoders that run."""

    def __init__(self, journal: str) -> None:
        self._journal = Journal(journal)
        self._running: dict[str, Any] = {}

    def report(self, name: str, *arguments: Any) -> Any:
        """Take in a report: a method of `MonitorState` and its arguments; returns what that does."""
        return self._journal.report(name, *arguments)

    def running(self, actor_id: str, encoder: Any) -> None:
        """An encoder lives: its actor's id and handle. It says so again and again, since no journal holds a handle."""
        self._running[actor_id] = encoder

    def end_encoders(self) -> None:
        """End all encoders. Ray Data leaves one that is just being restarted, which would keep its CPUs and GPUs."""
        for encoder in self._running.values():
            ray.kill(encoder)
        self._running.clear()

    def unfinished(self, shards: Sequence[str]) -> list[tuple[Unfinished, ...]]:
        """The attempts at each shard that have not ended."""
        return self._journal.state.unfinished(shards)

    def get(self) -> Counts:
        """The state as of now."""
        return self._journal.state.counts


class OutOfTries(Exception):
    """A shard's process has died as often as a pass allows, and Ray tries it again all the same."""


_numbers = itertools.count()


def add_counts(monitor: Any, written: int, failed: int, nbytes: int) -> None:
    """Report rows that were written and that failed, and bytes of the file."""
    monitor.report.remote("add", _process(), next(_numbers), written, failed, nbytes)


def _process() -> str:
    return str(ray.get_runtime_context().get_worker_id())


@contextmanager
def attempt_at(monitor: Any, shard: str, stage: Stage, tries: int | None = None) -> Iterator[Attempt | None]:
    """An attempt of this process at the shard, reported to the monitor before it begins: the process may die within.

    None without a monitor. tries: how many may be open in a pass. Raises OutOfTries for a further one: Ray does not
    count the processes that its memory monitor kills, and would go on for ever.
    """
    if monitor is None:
        yield None
        return
    node = ray.get_runtime_context().get_node_id()
    attempt = Attempt(shard, stage, node, _process(), next(_numbers))
    open_now: int = ray.get(monitor.report.remote("begin", attempt))
    try:
        if tries is not None and open_now > tries:
            raise OutOfTries(f"{open_now - 1} processes died at {shard}")
        yield attempt
    finally:
        monitor.report.remote("end", attempt)


def end_this_process(monitor: Any, attempt: Attempt | None, reason: str) -> None:
    """End the process as a crash would, so that Ray starts another in its place."""
    if monitor is not None:
        ray.get(monitor.report.remote("report_exit", attempt, reason))
    os._exit(1)
