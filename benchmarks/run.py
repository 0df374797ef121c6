"""Run the benchmarks one after another and print one table: `python -m benchmarks.run [claim …]`, e.g. `1 9b`.

Each claim's file is a process of its own; its figures and its machine are kept in `benchmarks/results/*.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if str(FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(FOLDER.parent))

from benchmarks.harness import RESULTS, Row, table  # noqa: E402


def claim_of(path: Path) -> str:
    """`claim_01b_name.py` -> `1b`."""
    found = re.match(r"claim_0*(\d+[a-z]?)_", path.name)
    if found is None:
        raise SystemExit(f"{path.name} is no claim_<number>_<name>.py")
    return found[1]


def run_claim(path: Path) -> list[Row]:
    """The rows that a claim's file measures; none if it fails (its messages are on the terminal)."""
    print(f"== {path.name}", flush=True)
    result = RESULTS / f"{path.stem}.json"
    result.unlink(missing_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    subprocess.run([sys.executable, str(path)], cwd=FOLDER.parent, env=environment, check=False)
    if not result.exists():
        return []
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    return [Row(**{name: value for name, value in row.items() if name != "met"}) for row in rows]


def main() -> int:
    """Run the chosen claims; the exit code is 1 if a target is missed or a benchmark fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claims", nargs="*", help="claims to run, e.g. 1 1b 9; all when none is given")
    wanted = set(parser.parse_args().claims)
    files = [path for path in sorted(FOLDER.glob("claim_*.py")) if not wanted or claim_of(path) in wanted]
    if unknown := wanted - {claim_of(path) for path in files}:
        parser.error(f"no benchmark for claim {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    failed: list[str] = []
    for path in files:
        measured = run_claim(path)
        rows += measured
        failed += [] if measured else [path.name]
    print(f"\n{table(rows)}")
    for name in failed:
        print(f"{name} failed: it left no result", file=sys.stderr)
    return 0 if not failed and all(row.met for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
