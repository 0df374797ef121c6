"""Trainings that take turns: what slows this machine for a while slows all of them, in whatever process they run.

`python -m benchmarks.turns <port> <member> <steps a turn> <flags of jobs/train.py>` is jobs/train.py as such a member.
"""

from __future__ import annotations

import runpy
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from benchmarks.harness import ROOT

HOST = "127.0.0.1"


class Turns:
    """Gives the members the turn, one after the other, when all of them have come.

    members: name -> its workers, which have the turn at the same time. `seconds`: of each turn by member, from the
    time when its workers get the turn until the last one gives it back; the last turn of each is not among them.
    """

    def __init__(self, members: Mapping[str, int]) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in members}
        self._missing = dict(members)
        self._here = {name: threading.Event() for name in members}
        self._workers: dict[str, list[Connection]] = {name: [] for name in members}
        self._listener = Listener((HOST, 0))
        self.port: int = self._listener.address[1]  # type: ignore[index]
        self._thread = threading.Thread(target=self._serve, name="turns", daemon=True)
        self._thread.start()

    def wait_for(self, member: str) -> None:
        """Until the member's workers stand before their first turn."""
        self._here[member].wait()

    def join(self) -> None:
        """Until all members have left."""
        self._thread.join()

    def _serve(self) -> None:
        while any(self._missing.values()):
            connection = self._listener.accept()
            name = connection.recv_bytes().decode()
            self._workers[name].append(connection)
            self._missing[name] -= 1
            if not self._missing[name]:
                self._here[name].set()
        while self._workers:
            for name in list(self._workers):
                self._give(name)

    def _give(self, name: str) -> None:
        workers = self._workers[name]
        began = time.perf_counter()
        try:
            for worker in workers:
                worker.send_bytes(b"yours")
            for worker in workers:
                worker.recv_bytes()
        except (EOFError, OSError):  # it has left
            for worker in self._workers.pop(name):
                worker.close()
            return
        self.seconds[name].append(time.perf_counter() - began)


class Turn:
    """One worker's place among the members."""

    def __init__(self, port: int, member: str) -> None:
        self._connection = Client((HOST, port))
        self._connection.send_bytes(member.encode())
        self._mine = False

    def next(self) -> None:
        """Give the turn to the next member, and wait until it comes back."""
        if self._mine:
            self._connection.send_bytes(b"next")
        self._connection.recv_bytes()
        self._mine = True

    def leave(self) -> None:
        """Take no further turns."""
        self._connection.close()


def in_turn(context: type[Any], port: int, member: str, steps: int = 1) -> type[Any]:
    """A `training.runtime.Context` like `context`, whose worker does so many steps a turn."""

    class InTurn(context):  # type: ignore[misc]
        turn: Turn | None = None
        asked = 0

        def stop_requested(self) -> bool:  # it is asked once, as a step begins
            if self.asked % steps == 0:
                self.turn = self.turn or Turn(port, member)
                self.turn.next()
            self.asked += 1
            return bool(super().stop_requested())

    return InTurn


def main() -> None:
    """jobs/train.py under torchrun, as a member."""
    from ray_diffsynth.training import local

    port, member, steps, *words = sys.argv[1:]
    local.LocalRuntime = in_turn(local.LocalRuntime, int(port), member, int(steps))  # type: ignore[misc]
    script = ROOT / "jobs" / "train.py"
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
