"""SkyPilot's tasks: the fields that our file uses, and the options of the job that a task runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.check.entrypoints import job_problems
from cluster.check.problem import Problem, mapping
from ray_diffsynth.errors import did_you_mean

TASK: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "workdir": (str,),
    "num_nodes": (int,),
    "resources": (dict,),
    "envs": (dict,),
    "secrets": (dict,),
    "file_mounts": (dict,),
    "setup": (str,),
    "run": (str,),
}
RESOURCES: dict[str, tuple[type, ...]] = {
    "accelerators": (str, dict),
    "any_of": (list,),
    "cpus": (str, int),
    "disk_size": (int, str),
    "disk_tier": (str,),
    "image_id": (str,),
    "infra": (str,),
    "instance_type": (str,),
    "job_recovery": (str, dict),
    "memory": (str, int),
    "network_tier": (str,),
    "use_spot": (bool,),
}
"""Fields of SkyPilot 0.14.1, as many as a task of ours may need, and the types of their values."""
_SCRIPT = re.compile(r"\S*skypilot/run\.sh\s+(\w+)")


def skypilot_problems(document: Mapping[str, Any]) -> Iterator[Problem]:
    """Fields that are not known or of another type, variables that nothing sets, secrets in the clear, the job."""
    if set(document) == {"name"}:  # the first document of several: the name of the whole
        return
    resources = mapping(document.get("resources"))
    for known, fields, place in ((TASK, document, ()), (RESOURCES, resources, ("resources",))):
        for key, value in fields.items():
            if key not in known:
                yield Problem((*place, key), f"no such field; {did_you_mean(str(key), known)}")
            elif not isinstance(value, known[key]):
                words = " or ".join(kind.__name__ for kind in known[key])
                yield Problem((*place, key), f"is {value!r}; write a {words}")
    named = resources.get("accelerators")
    if isinstance(named, str) and re.fullmatch(r"[A-Z][\w-]*:\d+", named) is None:
        yield Problem(("resources", "accelerators"), f"is {named!r}; write NAME:NUMBER, e.g. L4:1")
    for name, value in mapping(document.get("secrets")).items():
        if value is not None:
            yield Problem(("secrets", name), f"stands here in the clear; write null, and give --secret {name}")
    yield from _run(str(document.get("run", "")), mapping(document.get("envs")))


def _run(script: str, variables: Mapping[str, Any]) -> Iterator[Problem]:
    lines = [line for line in script.replace("\\\n", " ").splitlines() if _SCRIPT.search(line)]
    if not lines:
        yield Problem(("run",), "runs no job; write bash cluster/skypilot/run.sh JOB OPTIONS")
    for line in lines:
        used = set(re.findall(r"\$\{?([A-Z]\w+)", line))
        for name in sorted(used - set(variables)):
            yield Problem(("run",), f"${name} is set by nothing; add it to envs")
        command = re.sub(r"\$\{?([A-Z]\w+)\}?", lambda name: str(variables.get(name[1], "x")), line)
        try:
            shlex.split(command)
        except ValueError as error:
            yield Problem(("run",), f"is no shell command: {error}; close the quotes")
            continue
        yield from job_problems(_SCRIPT.sub(r"python jobs/\1.py", command.removeprefix("bash ")), ("run",))
