"""Versions that a file names, compared with those that this project is tested with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cluster.check.problem import Place, Problem, mapping, walk
from ray_diffsynth.version import __version__

ROOT = Path(__file__).resolve().parents[2]
_PIN = re.compile(r"\b(ray|torch|ray-diffsynth)(?:\[[\w,]+\])?==([\w.+]+)")
_TAG = re.compile(r"(?:^|/)(ray-diffsynth|ray|ray-ml):([\w.]+?)(?:-([\w.-]+))?$")


@cache
def pinned() -> dict[str, str]:
    """Package -> the version of constraints.txt, and our own."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    return {**found, "ray-diffsynth": __version__}


def version_problems(document: Any) -> Iterator[Problem]:
    """Pins in commands, `rayVersion`, and tags of images."""
    for place, value in walk(document):
        if isinstance(value, Mapping) and isinstance(value.get("image"), str):
            yield from _image(value["image"], mapping(mapping(value.get("resources")).get("limits")), (*place, "image"))
        if not isinstance(value, str):
            continue
        if place and place[-1] == "rayVersion" and value != pinned()["ray"]:
            yield Problem(place, f"{value} is not the tested version of Ray, {pinned()['ray']}")
        for package, version in _PIN.findall(value):
            if version != pinned()[package]:
                yield Problem(place, f"{package}=={version} is not the tested version, {pinned()[package]}")


def _image(image: str, limits: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    name = image.rsplit("/", 1)[-1]
    if "@sha256:" in name:
        return
    if ":" not in name or name.endswith(":latest"):
        yield Problem(place, f"{image} names no version: head and workers could differ; give a tag or a digest")
    elif tag := _TAG.search(image):
        wanted = pinned()["ray-diffsynth" if tag[1] == "ray-diffsynth" else "ray"]
        if tag[2] != wanted:
            yield Problem(place, f"{image} is of version {tag[2]}, not the tested one, {wanted}")
        if tag[3] == "cpu" and any(key.endswith("gpu") for key in limits):
            yield Problem(place, f"{image} has no CUDA, and this container asks for GPUs; use the tag with gpu")
