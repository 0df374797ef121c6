"""The numbers of a running training: `metrics.jsonl`, and the progress line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_diffsynth.progress import Progress
from ray_diffsynth.storage import exists, is_remote, join, read_bytes, write_bytes_atomic

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """`<output_path>/metrics.jsonl`: one JSON object a logged step, each step once, also over kills and resumes.

    A local file is appended to; on an object store it is written anew at every `flush`.
    """

    def __init__(self, output_path: str, *, after: int) -> None:
        """Keep what an earlier attempt logged up to step `after`, drop what comes later: it is done again."""
        self.path = join(output_path, METRICS_FILE)
        self._lines = [json.dumps(line) for line in read_metrics(output_path) if line["step"] <= after]
        self._remote = is_remote(self.path)
        self.flush(force=True)

    def write(self, metrics: Mapping[str, Any]) -> None:
        line = json.dumps(metrics)
        if self._remote:
            self._lines.append(line)
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def flush(self, *, force: bool = False) -> None:
        if self._remote or force:
            write_bytes_atomic(self.path, "".join(f"{line}\n" for line in self._lines).encode())


def read_metrics(output_path: str) -> list[dict[str, Any]]:
    """The logged steps of a run; a last line that a kill cut short is left out."""
    path = join(output_path, METRICS_FILE)
    if not exists(path):
        return []
    found = []
    for line in read_bytes(path).decode("utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return found


class TrainingProgress:
    """The progress line of a run, from the metrics that it reports."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def update(self, metrics: Mapping[str, Any]) -> None:
        if self._progress is None:
            done = metrics["samples_seen"] - metrics["samples"]
            self._progress = Progress("train", metrics["samples_total"], initial=done)
            self._progress.__enter__()
        postfix = {name: metrics[name] for name in ("loss",) if name in metrics}
        self._progress.update(metrics["samples_seen"], step=f"{metrics['step']}/{metrics['steps']}", **postfix)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None


def output_file(output_path: str, name: str) -> str:
    """Path of a result file; a local output folder is made."""
    if not is_remote(output_path):
        Path(output_path).mkdir(parents=True, exist_ok=True)
    return join(output_path, name)
