"""Files of Ray's cluster launcher: by Ray's own validation, and what that does not look at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

from cluster.check.problem import Problem, mapping, walk
from cluster.check.ray_commands import ray_start_problems

START = ("head_start_ray_commands", "worker_start_ray_commands")
_TOKEN = "RAY_AUTH_MODE=token"


def launcher_problems(document: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys, types, and bounds by Ray; commands of `ray start`; defaults that surprise."""
    yield from _validation(document)
    for name, kind in mapping(document.get("available_node_types")).items():
        if name != document.get("head_node_type") and "max_workers" not in mapping(kind):
            where = ("available_node_types", name, "max_workers")
            yield Problem(where, "is missing, and Ray then takes 2; say how many there may be")
    if "max_workers" not in document:
        yield Problem(("max_workers",), "is missing, and Ray then takes 2 for all groups together; say how many")
    if not document.get("setup_commands"):
        yield Problem(("setup_commands",), "are empty, and a provider's own then install a nightly Ray; install yours")
    if "~/.ray/auth_token" not in mapping(document.get("file_mounts")):
        message = "have no token, and nothing else copies it; add ~/.ray/auth_token: ~/.ray/auth_token"
        yield Problem(("file_mounts",), message)
    yield from _clouds(document)
    for key in START:
        commands = [str(command) for command in document.get(key) or ()]
        if not any("ray start" in command for command in commands):
            yield Problem((key,), "start no Ray; end them with ray start …")
        for at, command in enumerate(commands):
            yield from ray_start_problems(command, (key, at))
            if "ray start" in command and _TOKEN not in command:
                message = f"starts Ray without a token: whoever reaches it can run anything; export {_TOKEN} before it"
                yield Problem((key, at), message)
            if exposed := re.search(r"--dashboard-host[= ](?!127\.0\.0\.1|localhost)(\S+)", command):
                message = f"opens the dashboard to {exposed[1]}; write 127.0.0.1, and reach it by ray dashboard FILE"
                yield Problem((key, at), message)


def _clouds(document: Mapping[str, Any]) -> Iterator[Problem]:
    """What a cloud would refuse, or take in place of what was left out."""
    provider = mapping(document.get("provider"))
    cloud, zone = provider.get("type"), str(provider.get("availability_zone"))
    for name, kind in mapping(document.get("available_node_types")).items():
        where = ("available_node_types", name)
        config = mapping(mapping(kind).get("node_config"))
        if cloud == "aws" and "ImageId" not in config:
            message = (
                "is missing, and Ray then takes an image of Ubuntu 18.04, on which torch does not install; name one"
            )
            yield Problem((*where, "node_config", "ImageId"), message)
        if cloud == "gcp" and not mapping(mapping(kind).get("resources")):
            message = "are missing, and Ray detects none here: no job's demand starts this group; write CPU and GPU"
            yield Problem((*where, "resources"), message)
        for place, value in walk(config, (*where, "node_config")):
            found = re.search(r"\bzones/([\w-]+)/", value) if cloud == "gcp" and isinstance(value, str) else None
            if found and found[1] != zone:
                yield Problem(place, f"is in the zone {found[1]}, and the node would be in {zone}; write {zone}")


def _validation(document: Mapping[str, Any]) -> Iterator[Problem]:
    """What `ray up` itself refuses."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # hints of Ray that name no mistake
            validate_config(_with_detected_resources(prepare_config(dict(document))))
    except ValidationError as error:
        yield Problem(tuple(error.absolute_path), error.message)
    except Exception as error:  # whatever Ray's bootstrap raises: ValueError, KeyError, its own
        yield Problem((), f"{type(error).__name__}: {error}")


def _with_detected_resources(config: Mapping[str, Any]) -> dict[str, Any]:
    """AWS's provider fills in the resources of its instance types before Ray validates them; no other does."""
    types = config["available_node_types"]
    if config["provider"].get("type") == "aws":
        types = {name: {"resources": {}, **kind} for name, kind in types.items()}
    return {**config, "available_node_types": types}
