"""A mistake in a file of ours, and where things stand in these files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

GONE = object()
"""In place of a value: the key is not there."""


class Renamed(NamedTuple):
    """In place of a value: the key has another name."""

    name: str


class Mistake(NamedTuple):
    """file: of cluster/kuberay. changes: path -> new value, or a function of the old one. place, told: what is said."""

    file: str
    changes: dict[str, Any]
    place: str
    told: str


def changed(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The document with other values. A path has dots, and numbers for entries of lists."""
    for path, value in changes.items():
        *above, last = (int(key) if key.isdigit() else key.replace("~", ".") for key in path.split("."))
        inner: Any = document
        for key in above:
            inner = inner.setdefault(key, {}) if isinstance(inner, dict) else inner[key]
        if value is GONE:
            del inner[last]
        elif isinstance(value, Renamed):
            inner[value.name] = inner.pop(last)
        elif callable(value):
            inner[last] = value(inner[last])
        elif isinstance(inner, list) and last == len(inner):
            inner.append(value)
        else:
            inner[last] = value
    return document


def instead(old: str, new: str) -> Callable[[str], str]:
    """A text with another part."""
    return lambda text: text.replace(old, new)


J = "spec.rayClusterSpec"
ENCODE = f"{J}.workerGroupSpecs.0"
POD = f"{ENCODE}.template.spec"
BOX = f"{POD}.containers.0"
WHERE = "spec.rayClusterSpec.workerGroupSpecs[0]"
WHERE_BOX = f"{WHERE}.template.spec.containers[0]"
HEAD = "spec.headGroupSpec.template.spec"
PRE, RC, CRON, KUEUE, VOLCANO = "preprocess.yaml", "raycluster.yaml", "nightly.yaml", "kueue.yaml", "volcano.yaml"
AWS = "../launcher/aws.yaml"
