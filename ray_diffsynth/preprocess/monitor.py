"""What the driver knows of the tasks while they run: an actor beside it to which they report.

The only way by which tasks report attempts, progress and why the run must end. The driver polls it while a pass runs,
and evaluates it when the pass is over.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray

from ray_diffsynth.preprocess.attempts import Attempt, Attempts, Stage, Unfinished


class Counts(NamedTuple):
    """State of a `Monitor`: rows written and failed, bytes, encoders that have loaded, and why the run must end."""

    written: int = 0
    failed: int = 0
    nbytes: int = 0
    encoders: int = 0
    fatal: str = ""


@ray.remote(num_cpus=0)
class Monitor:
    """Actor: rows written and failed so far, encoders that have loaded, and the attempts at each shard."""

    def __init__(self) -> None:
        self.written = 0
        self.failed = 0
        self.nbytes = 0
        self.encoders = 0
        self.fatal = ""
        self.running: dict[str, Any] = {}
        self.loading: dict[str, list[str]] = {}
        self.attempts = Attempts()

    def begin_loading(self, actor_id: str, node: str) -> list[str]:
        """An encoder begins to load its models; the node of each time that it did so without coming to the end."""
        self.loading.setdefault(actor_id, []).append(node)
        return self.loading[actor_id]

    def loaded(self, actor_id: str, encoder: Any) -> None:
        """An encoder has its models: its actor's id and handle."""
        self.encoders += 1
        self.loading.pop(actor_id, None)
        self.running[actor_id] = encoder

    def end_encoders(self) -> None:
        """End all encoders. Ray Data leaves one that is just being restarted, which would keep its CPUs and GPUs."""
        for encoder in self.running.values():
            ray.kill(encoder)
        self.running.clear()

    def begin(self, attempt: Attempt) -> None:
        """A process begins an attempt at a shard, and may die in it."""
        self.attempts.begin(attempt)

    def begin_batch(self, attempt: Attempt, keys: Sequence[str]) -> None:
        """The process begins to encode these rows of the shard."""
        self.attempts.begin_batch(attempt, keys)

    def report_exit(self, attempt: Attempt, reason: str) -> None:
        """A process is about to end itself within an attempt."""
        self.attempts.report_exit(attempt, reason)

    def end(self, attempt: Attempt) -> None:
        """A process has ended its attempt at a shard."""
        self.attempts.end(attempt)

    def unfinished(self, shards: Sequence[str]) -> list[tuple[Unfinished, ...]]:
        """The attempts at each shard that have not ended."""
        return [self.attempts.unfinished(name) for name in shards]

    def give_up(self, reason: str) -> None:
        """Nothing can be encoded: the first reason stays."""
        self.fatal = self.fatal or reason

    def add(self, written: int, failed: int, nbytes: int) -> None:
        """Rows that were written and that failed, and bytes of the file."""
        self.written += written
        self.failed += failed
        self.nbytes += nbytes

    def get(self) -> Counts:
        """The state as of now."""
        return Counts(self.written, self.failed, self.nbytes, self.encoders, self.fatal)


_numbers = itertools.count()


@contextmanager
def attempt_at(monitor: Any, shard: str, stage: Stage) -> Iterator[Attempt | None]:
    """An attempt of this process at the shard, reported to the monitor before it begins: the process may die within.

    None without a monitor.
    """
    if monitor is None:
        yield None
        return
    context = ray.get_runtime_context()
    attempt = Attempt(shard, stage, context.get_node_id(), context.get_worker_id(), next(_numbers))
    ray.get(monitor.begin.remote(attempt))
    try:
        yield attempt
    finally:
        monitor.end.remote(attempt)


def end_this_process(monitor: Any, attempt: Attempt | None, reason: str) -> None:
    """End the process as a crash would, so that Ray starts another in its place."""
    if monitor is not None:
        ray.get(monitor.report_exit.remote(attempt, reason))
    os._exit(1)
