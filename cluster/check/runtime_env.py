"""The runtime environment of a RayJob, of which Ray takes a misspelled key without a word."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from cluster.check.problem import Place, Problem, mapping
from ray_diffsynth.errors import did_you_mean

SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|_KEY)$")
"""Names of variables whose value nobody else may read."""


def runtime_env_problems(text: str, place: Place) -> Iterator[Problem]:
    """Keys that Ray does not know, values that are no texts, secrets, and what the submitter's shell would fill in."""
    from ray.runtime_env import RuntimeEnv

    try:
        found: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield Problem(place, f"is no YAML: {' '.join(str(error).split())}")
        return
    if not isinstance(found, dict):
        yield Problem(place, "is no mapping; write e.g. env_vars: {NCCL_DEBUG: INFO}")
        return
    for key in found:
        if key not in RuntimeEnv.known_fields:
            known = [name for name in RuntimeEnv.known_fields if not name.startswith("_")]
            yield Problem(place, f"Ray has no {key}, and would drop it without a word; {did_you_mean(str(key), known)}")
    for name, value in mapping(found.get("env_vars")).items():
        if not isinstance(value, str):
            yield Problem(place, f"env_vars: {name}: {value!r} is no text; put it in quotes")
        elif SECRET.search(str(name)) and value:
            yield Problem(
                place, f"env_vars: {name} is shown on the dashboard; set it in the containers by valueFrom.secretKeyRef"
            )
    folder = found.get("working_dir")
    if isinstance(folder, str) and "://" not in folder:
        yield Problem(place, f"working_dir: {folder} is a folder of the submitter's pod; give the URL of a zip file")
    if special := re.search(r"[$`]", text):
        yield Problem(place, f"{special[0]} is filled in by the shell of the submitter's pod; leave it out")
