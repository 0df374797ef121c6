"""Attempts at shards that began and have not ended, as the processes report them: pure state, without Ray.

Reports may arrive late, twice, or after those of another process about the same shard. So each is about one attempt,
which belongs to one process on one machine, and never changes what is known of another attempt.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

Stage = Literal["decode", "encode", "write"]


class Attempt(NamedTuple):
    """One try of one process to take a shard through a stage. `number` counts the attempts of the process.

    `node` and `process` are Ray's ids of the machine and of the process (its worker id, never used again).
    """

    shard: str
    stage: Stage
    node: str
    process: str
    number: int


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An attempt whose end was never reported: its process died, or its machine.

    batch: keys of the rows that were being encoded. exit_reason: why the process ended itself, if it did.
    """

    attempt: Attempt
    batch: tuple[str, ...] = ()
    exit_reason: str = ""


class Attempts:
    """The attempts at the shards of one group that have begun and not ended."""

    def __init__(self) -> None:
        self._open: dict[str, dict[Attempt, Unfinished]] = {}
        self._newest: dict[str, int] = {}
        self._running: dict[str, Attempt] = {}

    def begin(self, attempt: Attempt) -> None:
        """A process begins; what it did before has ended, since it lives. An attempt that is over does not begin."""
        if attempt.number <= self._newest.get(attempt.process, -1):
            return
        if (before := self._running.get(attempt.process)) is not None:
            self.end(before)
        self._newest[attempt.process] = attempt.number
        self._running[attempt.process] = attempt
        self._open.setdefault(attempt.shard, {})[attempt] = Unfinished(attempt)

    def begin_batch(self, attempt: Attempt, keys: Sequence[str]) -> None:
        """The process begins to encode the rows of these keys."""
        if (known := self._of(attempt)) is not None:
            self._open[attempt.shard][attempt] = Unfinished(attempt, tuple(keys), known.exit_reason)

    def report_exit(self, attempt: Attempt, reason: str) -> None:
        """A process is about to end itself."""
        if (known := self._of(attempt)) is not None:
            self._open[attempt.shard][attempt] = Unfinished(attempt, known.batch, reason)

    def end(self, attempt: Attempt) -> None:
        """The process has ended the attempt, whether or not it succeeded."""
        self._newest[attempt.process] = max(attempt.number, self._newest.get(attempt.process, -1))
        if self._running.get(attempt.process) == attempt:
            del self._running[attempt.process]
        if self._of(attempt) is not None:
            del self._open[attempt.shard][attempt]
            if not self._open[attempt.shard]:  # else it would grow with the dataset
                del self._open[attempt.shard]

    def unfinished(self, shard: str) -> tuple[Unfinished, ...]:
        """The open attempts at a shard, in the order in which they began."""
        return tuple(self._open.get(shard, {}).values())

    def open(self) -> Iterator[Attempt]:
        """All attempts that have begun and not ended."""
        for attempts in self._open.values():
            yield from attempts

    def facts(self) -> dict[str, Any]:
        """All that is known, as JSON."""
        found = [
            [item.attempt, item.batch, item.exit_reason] for items in self._open.values() for item in items.values()
        ]
        return {"open": found, "newest": self._newest, "running": list(self._running.values())}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        """What `facts` gave."""
        made = cls()
        for attempt, batch, reason in facts["open"]:
            one = Attempt(*attempt)
            made._open.setdefault(one.shard, {})[one] = Unfinished(one, tuple(batch), reason)
        made._newest = dict(facts["newest"])
        made._running = {item.process: item for item in (Attempt(*found) for found in facts["running"])}
        return made

    def _of(self, attempt: Attempt) -> Unfinished | None:
        return self._open.get(attempt.shard, {}).get(attempt)


def on_living_nodes(attempts: Iterable[Unfinished], living: Collection[str]) -> list[Unfinished]:
    """The attempts whose machine is alive, so that their process died by itself and not with it."""
    return [item for item in attempts if item.attempt.node in living]
