"""Claim 9: stage 1 is killed at half and started again: samples encoded twice, rows twice or missing, total time.

Start-up apart: the time of a run counts from its first encoder call.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ROOT, Row, main
from benchmarks.stage1 import draw, fresh

IMAGES, SLEEP, TIMES = 640, 0.03, 3
SHARD, IN_FLIGHT = 64, 3
"""Rows of a file at this size; files under way with one actor: encoded, waiting for the actor, being written."""


def measure() -> list[Row]:
    import pyarrow.parquet as pq

    from ray_diffsynth.cache.inspection import inspect_cache
    from tests.preprocess.counting import FAMILY, build_model, calls

    root = Path(tempfile.mkdtemp(prefix="claim-09-"))
    data = draw(root / "data", IMAGES, 64, captions=4)
    model = build_model(root / "model", sleep=SLEEP)
    cache = root / "cache"
    command = [sys.executable, "jobs/preprocess.py", "--model", str(model), "--family", FAMILY, "--batch_size", "8"]
    command += ["--num_workers", "1", "--dataset_base_path", str(data), "--output_path", str(cache)]

    def written() -> int:
        return sum(pq.read_metadata(path).num_rows for path in (cache / "vae").glob("*.parquet"))

    def settle() -> None:
        """Wait until what the killed driver left of its Ray has ended: its encoder calls are not the rerun's first."""
        count, since = len(calls(model)), time.monotonic()
        while time.monotonic() - since < 5:
            time.sleep(0.1)
            if len(calls(model)) > count:
                count, since = len(calls(model)), time.monotonic()

    def run(until: int | None) -> float:
        """Seconds from the first encoder call to the end, or to the kill once `until` rows are written."""
        before = len(calls(model))
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        first = 0.0
        while process.poll() is None:
            if not first and len(calls(model)) > before:
                first = time.monotonic()
            if until is not None and written() >= until:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                spent = time.monotonic() - first
                settle()
                return spent
            time.sleep(0.05)
        if process.returncode:
            raise RuntimeError(f"stage 1 ended with {process.returncode}")
        return time.monotonic() - first

    ratios, repeated, wrong, seconds = [], [], [], []
    for _ in range(TIMES):
        fresh(cache)
        whole = run(None)
        fresh(cache)
        before = len(calls(model, "vae"))
        parts = run(IMAGES // 2), run(None)
        repeated.append(len(calls(model, "vae")) - before - IMAGES)
        facts = inspect_cache(str(cache))
        wrong.append(facts["duplicates"] + abs(IMAGES - facts["samples"]))
        ratios.append(sum(parts) / whole)
        seconds.append([round(value, 2) for value in (whole, *parts)])
    details = {"pictures": IMAGES, "repeated": repeated, "in_flight": IN_FLIGHT * SHARD, "ratios": ratios}
    details["seconds_whole_killed_rerun"] = seconds
    return [
        Row(
            "9",
            "killed at half: samples encoded again / in flight",
            max(repeated) / (IN_FLIGHT * SHARD),
            "<=",
            1,
            details,
        ),
        Row("9", "rows twice or missing", max(wrong), "<=", 0, {}),
        Row("9", "time of both runs / uninterrupted (start-up apart)", sorted(ratios)[TIMES // 2], "<=", 1.05, {}),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
