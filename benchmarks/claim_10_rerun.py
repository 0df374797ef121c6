"""Claim 10: a rerun of stage 1 on unchanged data, and one with 1 % new samples, against the full run; on a Ray that is
up.

The encoder sleeps 50 ms a sample: slower than most VAEs at 1024 pixels on a large GPU, faster than on a small one.
"""

from __future__ import annotations

import csv
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import Row, main, seconds
from benchmarks.stage1 import draw, local_ray, preprocess

IMAGES, ADDED, SLEEP = 2000, 20, 0.05


class Timed(NamedTuple):
    """Seconds of a run, and those without the start of its actors: from each group's first call on, to its last one or,
    of the group that comes last, to the end of the run.
    """

    total: float
    busy: float


def timed(model: Path, run: Callable[[], object]) -> Timed:
    """Watch the log of encoder calls while it runs."""
    from tests.preprocess.counting import calls

    spans: dict[str, tuple[float, float]] = {}
    ended = threading.Event()

    def watch() -> None:
        seen = len(calls(model))
        while not ended.wait(0.02):
            found, now = calls(model), time.perf_counter()
            for group in {line.split()[0] for line in found[seen:]}:
                spans[group] = (spans.get(group, (now, now))[0], now)
            seen = len(found)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        run()
    finally:
        end = time.perf_counter()
        ended.set()
        watcher.join()
    *others, last = sorted(spans.values())
    return Timed(end - began, sum(to - start for start, to in others) + end - last[0])


def measure() -> list[Row]:
    from tests.preprocess.counting import FAMILY, build_model, calls

    root = Path(tempfile.mkdtemp(prefix="claim-10-"))
    data, cache = draw(root / "data", IMAGES, 64, captions=50), root / "cache"
    model = build_model(root / "model", sleep=SLEEP)
    options = {"family": FAMILY, "batch_size": 8, "num_workers": 1}
    with local_ray():
        # An actor of a small run first, so that the full run does not pay for cold files.
        preprocess(model, draw(root / "warm", 8, 64), root / "warm-cache", **options)
        full = timed(model, lambda: preprocess(model, data, cache, **options))
        before = len(calls(model))
        unchanged = sorted(seconds(lambda: preprocess(model, data, cache, **options)) for _ in range(5))
        if len(calls(model)) != before:
            raise RuntimeError("an unchanged rerun encoded something")
        added: list[Timed] = []
        for first in range(IMAGES, IMAGES + 5 * ADDED, ADDED):
            draw(data, ADDED, 64, captions=50, first=first)
            added.append(timed(model, lambda: preprocess(model, data, cache, **options)))
    with open(data / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = sum(1 for _ in csv.reader(file)) - 1
    details = {"pictures": IMAGES, "rows_at_end": rows, "full_s": full, "unchanged_s": unchanged, "added_s": added}
    # All that a run does before its first actor starts, and after the last has ended, an unchanged rerun does too.
    percent = (unchanged[2] + sorted(run.busy for run in added)[2]) / (unchanged[2] + full.busy)
    return [
        Row("10", "unchanged rerun / full run", unchanged[2] / full.total, "<=", 0.02, details),
        Row("10", "1 % new samples / full run (start-up apart)", percent, "<=", 0.04, {}),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
