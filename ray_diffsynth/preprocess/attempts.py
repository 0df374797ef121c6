"""Who worked on which shard and did not come to the end, as the processes tell it: pure state, without Ray.

What a process tells may come late, twice, or after what another one tells of the same shard. So everything is told of
an attempt, which belongs to one process on one machine, and never changes what is known of another.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Stage = Literal["decode", "encode", "write"]


class Attempt(NamedTuple):
    """A process's work on a shard in one stage. `number` counts the attempts of the process, one after another.

    `node` and `process` are Ray's ids of the machine and of the process (its worker id, never used again).
    """

    shard: str
    stage: Stage
    node: str
    process: str
    number: int


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An attempt whose end was never told: its process died, or its machine.

    `batch`: keys of the rows that were encoded at that moment; `words`: the last words of the process.
    """

    attempt: Attempt
    batch: tuple[str, ...] = ()
    words: str = ""


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
        """These rows are encoded now."""
        if (known := self._of(attempt)) is not None:
            self._open[attempt.shard][attempt] = Unfinished(attempt, tuple(keys), known.words)

    def last_words(self, attempt: Attempt, words: str) -> None:
        """A process is about to end itself."""
        if (known := self._of(attempt)) is not None:
            self._open[attempt.shard][attempt] = Unfinished(attempt, known.batch, words)

    def end(self, attempt: Attempt) -> None:
        """The process came to the end of it, whether or not it succeeded."""
        self._newest[attempt.process] = max(attempt.number, self._newest.get(attempt.process, -1))
        if self._running.get(attempt.process) == attempt:
            del self._running[attempt.process]
        if self._of(attempt) is not None:
            del self._open[attempt.shard][attempt]

    def unfinished(self, shard: str) -> tuple[Unfinished, ...]:
        """Those of a shard, in the order in which they began."""
        return tuple(self._open.get(shard, {}).values())

    def _of(self, attempt: Attempt) -> Unfinished | None:
        return self._open.get(attempt.shard, {}).get(attempt)


def on_living_nodes(attempts: Iterable[Unfinished], living: Collection[str]) -> list[Unfinished]:
    """Those whose machine still lives: their process died by itself. What died with its machine is nobody's fault."""
    return [item for item in attempts if item.attempt.node in living]
