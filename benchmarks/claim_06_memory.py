"""Claim 6: the driver's memory does not grow with the dataset, and a reader's stays within its budget."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.caches import gaussian_cache
from benchmarks.harness import ROOT, Row, main
from benchmarks.stage1 import draw, fresh

SMALL, FACTOR, TIMES = 64, 64, 1  # the same run again differs by a megabyte
BUDGET = 64 << 20

READER = """
import sys
from ray_diffsynth.cache.reader import CacheReader
def peak():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status", encoding="utf-8") if l.startswith("VmHWM"))
reader = CacheReader(sys.argv[1], max_cached_bytes=int(sys.argv[2]))
reader.read([0])
before = peak()
for start in range(0, len(reader), 4):
    reader.read(range(start, min(start + 4, len(reader))))
print(peak() - before)
"""


def peak_of(command: list[str]) -> int:
    """Peak memory (bytes, VmHWM) of a process, read until it ends."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
        except FileNotFoundError:
            break
        lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
        most = max([most, *(int(line.split()[1]) * 1024 for line in lines)])
        time.sleep(0.05)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return most


def measure() -> list[Row]:
    from tests.preprocess.counting import FAMILY, build_model

    root = Path(tempfile.mkdtemp(prefix="claim-06-"))
    model = build_model(root / "model")
    few, many = draw(root / "few", SMALL, 32), draw(root / "many", SMALL * FACTOR, 32)

    def driver(data: Path) -> int:
        command = [sys.executable, "jobs/preprocess.py", "--model", str(model), "--family", FAMILY, "--batch_size", "8"]
        return peak_of([*command, "--dataset_base_path", str(data), "--output_path", str(fresh(root / "cache"))])

    pairs = [(driver(few), driver(many)) for _ in range(TIMES)]
    ratios = sorted(large / small for small, large in pairs)
    gaussian_cache(root / "gaussian", 512)
    command = [sys.executable, "-c", READER, str(root / "gaussian"), str(BUDGET)]
    grown = int(subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout)
    details = {
        "pairs_mb": [[round(value / 1e6) for value in pair] for pair in pairs],
        "samples": [SMALL, SMALL * FACTOR],
    }
    return [
        Row("6", f"driver memory at {FACTOR}x the samples / 1x", ratios[len(ratios) // 2], "<=", 1.05, details),
        Row(
            "6",
            "growth of a reading worker / its budget",
            grown / BUDGET,
            "<=",
            1.2,
            {"budget": BUDGET, "grown": grown},
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
