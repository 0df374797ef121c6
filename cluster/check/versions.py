"""Versions that a file names, compared with those that this project is tested with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from cluster.check.problem import Problem, walk
from ray_diffsynth.version import __version__

ROOT = Path(__file__).resolve().parents[2]
_PIN = re.compile(r"\b(ray|torch|ray-diffsynth)(?:\[[\w,]+\])?==([\w.+]+)")
_IMAGE = re.compile(r"ray-diffsynth:([\w.]+?)(?:-(cpu|gpu))?$")


@cache
def pinned() -> dict[str, str]:
    """Package -> the version of constraints.txt, and our own."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    return {**found, "ray-diffsynth": __version__}


def version_problems(document: Any) -> Iterator[Problem]:
    """Pins in commands, `rayVersion`, and tags of our image."""
    for place, value in walk(document):
        if not isinstance(value, str):
            continue
        if place and place[-1] == "rayVersion" and value != pinned()["ray"]:
            yield Problem(place, f"{value} is not the tested version of Ray, {pinned()['ray']}")
        for package, version in _PIN.findall(value):
            if version != pinned()[package]:
                yield Problem(place, f"{package}=={version} is not the tested version, {pinned()[package]}")
        if place and place[-1] == "image" and (tag := _IMAGE.search(value)) and tag[1] != __version__:
            yield Problem(place, f"the image is of version {tag[1]}, this is {__version__}")
