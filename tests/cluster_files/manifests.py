"""The files of cluster/ as data, and how a test changes them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster" / "kuberay"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    """The document of a file of cluster/kuberay, without anchors: what one names stands in each place by itself."""
    found: dict[str, Any] = json.loads(_as_json(name))
    return found


@cache
def _as_json(name: str) -> str:
    return json.dumps(yaml.safe_load((FOLDER / name).read_text(encoding="utf-8")))


def job_of(document: dict[str, Any]) -> dict[str, Any] | None:
    """The specification of the job, if the document has one."""
    spec: dict[str, Any] = document["spec"]
    return {"RayJob": spec, "RayCronJob": spec.get("jobTemplate")}.get(document["kind"])


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """The specification of the Ray cluster."""
    job = job_of(document)
    found: dict[str, Any] = document["spec"] if job is None else job["rayClusterSpec"]
    return found
