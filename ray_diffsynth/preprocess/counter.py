"""What the driver knows of the tasks while they run: an actor beside it that they tell."""

import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import ray

Stage = Literal["decode", "decoded", "encode", "encoded"]


class End(NamedTuple):
    """Where a shard was last: its stage, the rows that were encoded at that moment, the last words of the process."""

    stage: Stage | None
    batch: tuple[str, ...] = ()
    words: str = ""


class Counts(NamedTuple):
    """State of a `Counter`: rows written and failed, bytes, encoders that have loaded, and why the run must end."""

    written: int = 0
    failed: int = 0
    nbytes: int = 0
    encoders: int = 0
    fatal: str = ""


@ray.remote(num_cpus=0)
class Counter:
    """Rows written and failed so far, encoders that came to life, and which stage each shard has reached."""

    def __init__(self) -> None:
        self.written = 0
        self.failed = 0
        self.nbytes = 0
        self.encoders = 0
        self.fatal = ""
        self.running: dict[str, Any] = {}
        self.loading: dict[str, int] = {}
        self.stages: dict[str, Stage] = {}
        self.batches: dict[str, Sequence[str]] = {}
        self.words: dict[str, str] = {}

    def begin_loading(self, actor_id: str) -> int:
        """An encoder begins to load its models; returns how often it did so without coming to the end."""
        self.loading[actor_id] = self.loading.get(actor_id, 0) + 1
        return self.loading[actor_id]

    def loaded(self, actor_id: str, encoder: Any) -> None:
        """An encoder has its models: its actor's id and handle."""
        self.encoders += 1
        self.loading[actor_id] = 0
        self.running[actor_id] = encoder

    def end_encoders(self) -> None:
        """End all encoders. Ray Data leaves one that is just being restarted, which would keep its CPUs and GPUs."""
        for encoder in self.running.values():
            ray.kill(encoder)
        self.running.clear()

    def reach(self, shard: str, stage: Stage) -> None:
        """A shard has reached a stage; if its process dies, this tells where."""
        self.stages[shard] = stage
        self.batches.pop(shard, None)

    def begin_batch(self, shard: str, keys: Sequence[str]) -> None:
        """These rows of the shard are encoded now."""
        self.batches[shard] = keys

    def reached(self, shards: Sequence[str]) -> list[End]:
        """How far each shard came."""
        return [End(self.stages.get(n), tuple(self.batches.get(n, ())), self.words.get(n, "")) for n in shards]

    def last_words(self, shard: str, words: str) -> None:
        """A process is about to end itself while it works on the shard."""
        self.words[shard] = words

    def give_up(self, reason: str) -> None:
        """Nothing can be encoded: the first reason stays."""
        self.fatal = self.fatal or reason

    def add(self, written: int, failed: int, nbytes: int) -> None:
        self.written += written
        self.failed += failed
        self.nbytes += nbytes

    def get(self) -> Counts:
        return Counts(self.written, self.failed, self.nbytes, self.encoders, self.fatal)


_connected: set[str] = set()


def reach(counter: Any, shard: str, stage: Stage) -> None:
    """Tell the counter where the shard is now: this process may die any moment."""
    if counter is None:
        return
    told = counter.reach.remote(shard, stage)
    if repr(counter) not in _connected:
        # A process's first call looks for the counter, which may last longer than the process; the next go out at once.
        ray.get(told)
        _connected.add(repr(counter))


def end_this_process(counter: Any, shard: str, words: str) -> None:
    """End the process as a crash would, so that Ray starts another in its place."""
    if counter is not None:
        ray.get(counter.last_words.remote(shard, words))
    os._exit(1)
