"""What a `Monitor` knows, and its journal: a monitor that is killed and started again knows what it knew. Without Ray.

A report is a method's name and plain arguments, so a line of JSON; it is in the journal before its caller hears of it.
Ray repeats a call whose answer was lost with the process, so a report that comes twice, one process's in order, counts
once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from ray_diffsynth.preprocess.attempts import Attempt, Attempts, Unfinished

logger = logging.getLogger(__name__)

JOURNAL_BYTES = 2**20
"""A journal that is longer is replaced by the state that it amounts to: it does not grow with the dataset."""


class Counts(NamedTuple):
    """State of a `Monitor`: rows written and failed, bytes, encoders that have loaded, and why the run must end."""

    written: int = 0
    failed: int = 0
    nbytes: int = 0
    encoders: int = 0
    fatal: str = ""


class MonitorState:
    """Rows written and failed so far, encoders that have loaded, the attempts at each shard, why the run must end."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.loading: dict[str, list[list[str]]] = {}
        self.attempts = Attempts()
        self._counted: dict[str, int] = {}
        self._loaded: dict[str, str] = {}
        self._before: set[Attempt] = set()

    def begin_pass(self) -> None:
        """From now on `begin` counts anew: what has died until now counts for the driver alone."""
        self._before = set(self.attempts.open())

    def begin(self, attempt: Sequence[Any]) -> int:
        """A process begins an attempt at a shard, and may die in it; how many it is of this pass that did not end."""
        one = Attempt(*attempt)
        self.attempts.begin(one)
        found = (item.attempt for item in self.attempts.unfinished(one.shard))
        return sum(item.stage == one.stage and item not in self._before for item in found)

    def begin_batch(self, attempt: Sequence[Any], keys: Sequence[str]) -> None:
        """The process begins to encode these rows of the shard."""
        self.attempts.begin_batch(Attempt(*attempt), keys)

    def report_exit(self, attempt: Sequence[Any], reason: str) -> None:
        """A process is about to end itself within an attempt."""
        self.attempts.report_exit(Attempt(*attempt), reason)

    def end(self, attempt: Sequence[Any]) -> None:
        """A process has ended its attempt at a shard."""
        self.attempts.end(Attempt(*attempt))

    def add(self, process: str, number: int, written: int, failed: int, nbytes: int) -> None:
        """Rows that were written and that failed, and bytes of the file; the process numbers what it reports."""
        if number <= self._counted.get(process, -1):
            return
        self._counted[process] = number
        now = self.counts
        self.counts = now._replace(
            written=now.written + written, failed=now.failed + failed, nbytes=now.nbytes + nbytes
        )

    def give_up(self, reason: str) -> None:
        """Nothing can be encoded: the first reason stays."""
        self.counts = self.counts._replace(fatal=self.counts.fatal or reason)

    def begin_loading(self, actor: str, node: str, process: str) -> list[str]:
        """An encoder begins to load its models; the node of each time that it did so without coming to the end."""
        begun = self.loading.setdefault(actor, [])
        if [node, process] not in begun:
            begun.append([node, process])
        return [node for node, _ in begun]

    def loaded(self, actor: str, process: str) -> None:
        """An encoder has its models."""
        if self._loaded.get(actor) != process:
            self._loaded[actor] = process
            self.counts = self.counts._replace(encoders=self.counts.encoders + 1)
        self.loading.pop(actor, None)

    def unfinished(self, shards: Sequence[str]) -> list[tuple[Unfinished, ...]]:
        """The attempts at each shard that have not ended."""
        return [self.attempts.unfinished(name) for name in shards]

    def restore(self, facts: dict[str, Any]) -> None:
        """Become the state whose `facts` these are."""
        self.counts = Counts(*facts["counts"])
        self.loading = facts["loading"]
        self.attempts = Attempts.from_facts(facts["attempts"])
        self._counted, self._loaded = facts["counted"], facts["loaded"]
        self._before = {Attempt(*item) for item in facts["before"]}

    def facts(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "counts": self.counts,
            "loading": self.loading,
            "attempts": self.attempts.facts(),
            "counted": self._counted,
            "loaded": self._loaded,
            "before": sorted(self._before),
        }


REPORTS = ("begin_pass", "begin", "begin_batch", "report_exit", "end", "add", "give_up", "begin_loading", "loaded")
"""Methods of `MonitorState` that change it: what a journal holds, beside `restore`."""


class Journal:
    """A state and the file from which another process has it again: a line for each report, the last perhaps cut off.

    Where the file cannot be written the state goes on without, with a warning: then a restart begins with nothing.
    """

    def __init__(self, path: str, most_bytes: int = JOURNAL_BYTES) -> None:
        self.state = MonitorState()
        self._path, self._most_bytes = path, most_bytes
        self._file: int | None = None
        if os.path.exists(path):
            with open(path, "rb") as file:
                lines = file.read().split(b"\n")[:-1]  # of the line that is cut off nobody was told
            for line in lines:
                name, *arguments = json.loads(line)
                self._apply(name, arguments)
        self._replace()

    def report(self, name: str, *arguments: Any) -> Any:
        """Write a report down and take it in; what the method of this name returns."""
        self._write(_line(name, arguments))
        answer = self._apply(name, arguments)
        if self._length > self._most_bytes:
            self._replace()
        return answer

    def _apply(self, name: str, arguments: Sequence[Any]) -> Any:
        if name not in REPORTS and name != "restore":
            raise ValueError(f"{name!r} is no report; choose from {', '.join(REPORTS)}")
        return getattr(self.state, name)(*arguments)

    def _replace(self) -> None:
        """Begin a new journal with the state as it is, in the place of the former one at once."""
        line = _line("restore", [self.state.facts()])
        new = f"{self._path}.new"
        try:
            file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            _write_all(file, line)
            os.replace(new, self._path)
        except OSError as error:
            self._stop(error)
            return
        if self._file is not None:
            os.close(self._file)
        self._file, self._length = file, len(line)
        self._most_bytes = max(self._most_bytes, 2 * len(line))  # else a long state would be written each time

    def _write(self, line: bytes) -> None:
        if self._file is None:
            return
        try:
            _write_all(self._file, line)
        except OSError as error:
            self._stop(error)
        self._length += len(line)

    def _stop(self, error: OSError) -> None:
        logger.warning("what the run knows of its tasks is lost if its monitor dies: %s: %s", self._path, error)
        self._length = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None
        for path in (self._path, f"{self._path}.new"):  # half of it would be restored as if it were all
            try:
                os.unlink(path)
            except OSError:
                continue


def _line(name: str, arguments: Sequence[Any]) -> bytes:
    return json.dumps([name, *arguments]).encode() + b"\n"


def _write_all(file: int, data: bytes) -> None:
    """Give all of it to the system, which keeps it when this process dies."""
    while data:
        data = data[os.write(file, data) :]
