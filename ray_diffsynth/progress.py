"""Progress of a job: a bar on a terminal, one plain line every few seconds in a log file; at most 80 columns."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

WIDTH = 80
_BAR = 12
_WINDOW_SECONDS = 60.0


class RateWindow:
    """Units a second over about the last minute.

    ``done``: units at the start. ``least``: seconds after which there is a rate; before it is 0.
    """

    def __init__(self, done: int = 0, *, least: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._least = clock, least
        self._marks: deque[tuple[float, int]] = deque([(clock(), done)])

    def add(self, done: int) -> None:
        """``done`` units are done in all by now."""
        now = self._clock()
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] > _WINDOW_SECONDS:
            self._marks.popleft()

    @property
    def rate(self) -> float:
        """Units a second."""
        (first, start), (last, end) = self._marks[0], self._marks[-1]
        return (end - start) / (last - first) if last > first and last - first >= self._least else 0.0


class Progress:
    """Counts ``completed`` of ``total`` and shows the rate, the time left and the latest values.

    Use as a context manager. ``total`` is None when unknown. ``initial`` was done before this run and does not count
    for the rate. On a terminal a bar is redrawn, elsewhere a line is printed every ``interval`` seconds and at the end.
    Not for use by several threads at once.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        unit: str = "samples",
        initial: int = 0,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.completed = initial
        self._values: dict[str, float | str] = {}
        self._stream = stream or sys.stderr
        self._clock, self._interval = clock, interval
        self._window = RateWindow(initial, least=0.1, clock=clock)
        self._last_line = clock()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            console = Console(file=self._stream, width=min(WIDTH, Console(file=self._stream).width))
            text = TextColumn("{task.fields[line]}", markup=False)
            self._bar = RichProgress(BarColumn(bar_width=_BAR), text, console=console)
            self._bar.add_task("", total=self.total, completed=self.completed, line=self.line(WIDTH - _BAR - 1))
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._print()

    def advance(self, count: int = 1, **values: float | str) -> None:
        """``count`` more are done; ``values`` (such as ``loss=0.1``) are shown until replaced."""
        self.update(self.completed + count, **values)

    def update(self, completed: int, **values: float | str) -> None:
        """``completed`` are done in all."""
        self.completed = completed
        self._values.update(values)
        self._window.add(completed)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=completed, line=self.line(WIDTH - _BAR - 1))
        elif self._clock() - self._last_line >= self._interval:
            self._print()

    @property
    def rate(self) -> float:
        """Units a second over about the last minute; 0 within the first tenth of a second."""
        return self._window.rate

    def line(self, width: int = WIDTH - 1) -> str:
        """The state in one line of at most ``width`` characters."""
        rate = self.rate
        of = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.description} {self.completed}{of}", f"{rate:.3g} {self.unit}/s"]
        if self.total is not None and rate > 0:
            parts.append(f"ETA {_clock_time((self.total - self.completed) / rate)}")
        parts += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self._values.items()]
        return "  ".join(parts)[:width]

    def _print(self) -> None:
        self._last_line = self._clock()
        print(self.line(), file=self._stream, flush=True)


def _clock_time(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
