"""What every benchmark shares: the row of the table, measuring two things in turn, and the result file.

A claim's file is `benchmarks/claim_<number>_<name>.py`. It defines `measure() -> list[Row]` and ends with
`raise SystemExit(main(__file__, measure))`. It runs in a process of its own, so that neither memory nor Ray is shared.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One line of the table. `measured` is a ratio or a count, `details` whatever explains it (plain JSON values)."""

    claim: str
    what: str
    measured: float
    at: Literal[">=", "<="]
    target: float
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the measured value keeps the target."""
        return self.measured >= self.target if self.at == ">=" else self.measured <= self.target


def in_turn(first: Callable[[], float], second: Callable[[], float], times: int = 5) -> dict[str, Any]:
    """Call both in turn (A B A B …), `times` each; each returns its own value (seconds, or a rate).

    Gives `ratio`, the median of the pairs' second / first: what is slow on this machine just then is slow for both.
    """
    pairs = [(first(), second()) for _ in range(times)]
    ratios = [b / a for a, b in pairs]
    medians = [statistics.median(values) for values in zip(*pairs, strict=True)]
    return {"ratio": statistics.median(ratios), "first": medians[0], "second": medians[1], "ratios": ratios}


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes, in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """The machine that a result is from."""
    import torch

    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


@contextmanager
def earlier_build(commit: str) -> Iterator[Path]:
    """The files of this repository at an earlier commit, in a folder that is removed at the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory(prefix="earlier-build-") as folder:
        build = Path(folder) / commit
        subprocess.run([*git, "add", "--detach", str(build), commit], check=True, capture_output=True)
        try:
            yield build
        finally:
            subprocess.run([*git, "remove", "--force", str(build)], check=True, capture_output=True)


def main(file: str, measure: Callable[[], list[Row]]) -> int:
    """Measure, write `results/<file>.json`, print the rows; the exit code says whether all targets are met."""
    from ray_diffsynth.report import library_versions

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    before = machine()
    start = time.perf_counter()
    rows = measure()
    result = {
        "rows": [{**asdict(row), "met": row.met} for row in rows],
        "seconds": round(time.perf_counter() - start, 1),
        "machine": before,
        "versions": library_versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{Path(file).stem}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(rows))
    return 0 if all(row.met for row in rows) else 1


def table(rows: list[Row]) -> str:
    """Claim, what, measured, target, met: one aligned line a row."""
    width = max((len(row.what) for row in rows), default=4)
    lines = [f"{'claim':5}  {'what':{width}}  {'measured':>9}  {'target':>8}  met"]
    for row in rows:
        target = f"{row.at} {row.target:g}"
        lines.append(
            f"{row.claim:5}  {row.what:{width}}  {row.measured:9.4g}  {target:>8}  {'yes' if row.met else 'NO'}"
        )
    return "\n".join(lines)
