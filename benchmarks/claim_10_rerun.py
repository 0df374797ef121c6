"""Claim 10: a rerun of stage 1 on unchanged data, and one with 1 % new samples, against the full run; on a Ray that is
up.

The encoder sleeps 50 ms a sample: slower than most VAEs at 1024 pixels on a large GPU, faster than on a small one.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

from benchmarks.harness import Row, main, seconds
from benchmarks.stage1 import draw, local_ray, preprocess

PICTURES, SLEEP = 2000, 0.05


def measure() -> list[Row]:
    from tests.preprocess.counting import FAMILY, build_model, calls

    root = Path(tempfile.mkdtemp(prefix="claim-10-"))
    data, cache = draw(root / "data", PICTURES, 64, captions=50), root / "cache"
    model = build_model(root / "model", sleep=SLEEP)
    options = {"family": FAMILY, "batch_size": 8, "num_workers": 1}
    with local_ray():
        # An actor of a small run first, so that the full run does not pay for cold files.
        preprocess(model, draw(root / "warm", 8, 64), root / "warm-cache", **options)
        full = seconds(lambda: preprocess(model, data, cache, **options))
        before = len(calls(model))
        unchanged = sorted(seconds(lambda: preprocess(model, data, cache, **options)) for _ in range(5))
        if len(calls(model)) != before:
            raise RuntimeError("an unchanged rerun encoded something")
        one: list[float] = []
        added: list[float] = []
        first = PICTURES
        for _ in range(5):
            for times, count in ((one, 1), (added, 1 + PICTURES // 100)):
                draw(data, count, 64, captions=50, first=first)
                first += count
                times.append(seconds(lambda: preprocess(model, data, cache, **options)))
    with open(data / "metadata.csv", newline="") as file:
        rows = sum(1 for _ in csv.reader(file)) - 1
    details = {"pictures": PICTURES, "rows_at_end": rows, "full_s": full, "unchanged_s": unchanged}
    details |= {"one_new_s": sorted(one), "one_percent_new_s": sorted(added)}
    # An actor's start is what one new sample costs over none.
    start_up = sorted(one)[2] - unchanged[2]
    percent = (sorted(added)[2] - start_up) / (full - start_up)
    return [
        Row("10", "unchanged rerun / full run", unchanged[2] / full, "<=", 0.02, details),
        Row("10", "1 % new samples / full run (start-up apart)", percent, "<=", 0.04, {"start_up_s": start_up}),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
