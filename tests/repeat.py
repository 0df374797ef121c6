"""Run tests again and again, to find those that pass only most of the time:

    python -m tests.repeat [--times 20] [--busy 2] [TEST …]

TEST is what pytest takes (a file, a folder, `file.py::test`); without any, all tests that are marked `ray`. Each round
is one process of pytest with a log of its own. Nothing stops the rounds. At the end each test has a line with how often
it passed; a failure is named with its log. The exit code is 0 only when every test passed in every round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"
"""A process that computes until it or its parent is ended."""


@dataclass
class Outcomes:
    """Rounds of one test: how often it passed or was skipped, and the logs of the rounds in which it did neither."""

    passed: int = 0
    skipped: int = 0
    failed: list[Path] = field(default_factory=list)


class Recorder:
    """Plugin of pytest that writes each test's name when it begins and its outcome when it ends, a JSON line each."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open until the process ends)
        self.outcome = ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome = "passed"
        self._write(nodeid, "began")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.outcome = "failed"
        elif report.skipped and self.outcome == "passed":
            self.outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write(nodeid, self.outcome)

    def _write(self, nodeid: str, outcome: str) -> None:
        self.file.write(json.dumps([nodeid, outcome]) + "\n")


def record_round(path: str, arguments: Sequence[str]) -> int:
    """In a round's process: run pytest and record outcomes in `path`."""
    return int(pytest.main(["-p", "no:cacheprovider", "-v", "--durations=0", *arguments], plugins=[Recorder(path)]))


def read_round(path: Path) -> dict[str, str]:
    """The last that is known of each test; one that `began` ended its process, or was ended with it."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(json.loads(line) for line in lines)


def count(outcomes: dict[str, Outcomes], found: dict[str, str], log: Path, code: int) -> None:
    """Add a round. A round that fails although no test of it did (nothing was collected …) is a failure by itself."""
    for name, outcome in found.items():
        of_test = outcomes.setdefault(name, Outcomes())
        if outcome in ("passed", "skipped"):
            setattr(of_test, outcome, getattr(of_test, outcome) + 1)
        else:
            of_test.failed.append(log)
    if code and all(outcome in ("passed", "skipped") for outcome in found.values()):
        outcomes.setdefault(f"(the round itself, exit code {code})", Outcomes()).failed.append(log)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Within it so many other processes compute all the time."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def summary(outcomes: dict[str, Outcomes]) -> str:
    """A line for each test, those that failed last, with their logs."""
    lines = []
    for name, of_test in sorted(outcomes.items(), key=lambda item: (len(item[1].failed), item[0])):
        skipped = f", {of_test.skipped} skipped" if of_test.skipped else ""
        lines.append(f"{of_test.passed} passed, {len(of_test.failed)} failed{skipped}  {name}")
        lines += [f"    {log}" for log in of_test.failed]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", metavar="TEST", help="default: every test that is marked `ray`")
    parser.add_argument("--times", type=int, default=20, help="rounds")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside the tests")
    parser.add_argument("--logs", type=Path, help="folder of the logs; default: a new temporary one")
    parser.add_argument("--record", help=argparse.SUPPRESS)  # this process is a round
    options = parser.parse_args(arguments)
    chosen = options.tests or ["-m", "ray"]
    if options.record:
        return record_round(options.record, chosen)
    logs: Path = options.logs or Path(tempfile.mkdtemp(prefix="repeat-"))
    logs.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcomes] = {}
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    try:
        with busy(options.busy):
            for number in range(1, options.times + 1):
                log, record = logs / f"{number:03d}.log", logs / f"{number:03d}.jsonl"
                record.unlink(missing_ok=True)
                began = time.monotonic()
                with open(log, "wb") as output:
                    command = [sys.executable, "-m", "tests.repeat", "--record", str(record), *options.tests]
                    ended = subprocess.run(
                        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
                    )
                found = read_round(record)
                count(outcomes, found, log, ended.returncode)
                bad = [name for name, outcome in found.items() if outcome not in ("passed", "skipped")]
                seconds = time.monotonic() - began
                line = f"round {number} of {options.times}: {len(found)} tests, {len(bad)} failed, {seconds:.0f} s"
                print(line, flush=True)
    finally:
        print(summary(outcomes))
    return int(any(of_test.failed for of_test in outcomes.values()) or not outcomes)


if __name__ == "__main__":
    sys.exit(main())
