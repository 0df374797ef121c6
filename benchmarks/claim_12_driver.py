"""Claim 12: what stage 1's driver takes for many rows, by this build and by an earlier one, each in a process.

Rows have captions of 170 characters, and in the second table 15 further columns; see `driver_memory.py`. Seconds are of
CPU, since machines are shared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Row, earlier_build, main

BEFORE = "e1ebf4a"
"""Commit of the last build that held a row as objects; in those before it other modules read the metadata."""
ROWS = (10_000, 100_000, 1_000_000)
COMPARED = 100_000
"""Rows for which both builds are run in turn."""
TIMES = 3


def run(build: Path, rows: int, columns: int = 0) -> dict[str, Any]:
    """One run of a build; see `driver_memory.py`."""
    environment = {**os.environ, "PYTHONPATH": str(build), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="claim-12-") as folder:
        script = str(ROOT / "benchmarks" / "driver_memory.py")
        command = [sys.executable, "-W", "ignore", script, str(Path(folder) / "run"), str(rows), str(columns)]
        done = subprocess.run(command, cwd=build, env=environment, text=True, capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure() -> list[Row]:
    with earlier_build(BEFORE) as old:
        pairs = [(run(old, COMPARED), run(ROOT, COMPARED)) for _ in range(TIMES)]
        alone = [run(ROOT, rows) for rows in ROWS]
        wide = run(ROOT, COMPARED, columns=15)
    details = {"before": [a for a, _ in pairs], "now": [b for _, b in pairs]}
    seconds = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
    memory = statistics.median(b["peak"] / a["peak"] for a, b in pairs)
    a_row = (alone[-1]["peak"] - alone[0]["peak"]) / (ROWS[-1] - ROWS[0])
    return [
        Row("12", f"CPU of {COMPARED} rows, no-op encoder, / by {BEFORE}", seconds, "<=", 0.5, details),
        Row("12", f"the driver's peak for {COMPARED} rows / by {BEFORE}", memory, "<=", 0.5, {}),
        Row("12", f"KB a row from {ROWS[0]} to {ROWS[-1]} rows", a_row / 1e3, "<=", 0.15, {"runs": alone}),
        Row("12", f"KB a row of {COMPARED} with 15 further columns", wide["peak"] / COMPARED / 1e3, "<=", 0.2, {}),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
