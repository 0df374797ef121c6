"""Files of Ray's cluster launcher: by Ray's own validation, and what that does not look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.check.entrypoints import ray_start_problems
from cluster.check.problem import Problem

START = ("head_start_ray_commands", "worker_start_ray_commands")
SETUP = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")


def launcher_problems(document: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys, types, and bounds by Ray; commands of `ray start`; defaults that surprise."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(_with_detected_resources(prepare_config(dict(document))))
    except ValidationError as error:
        yield Problem(tuple(error.absolute_path), error.message)
    except Exception as error:  # whatever Ray's bootstrap raises: ValueError, KeyError, its own
        yield Problem((), f"{type(error).__name__}: {error}")
    types = document.get("available_node_types")
    for name, kind in types.items() if isinstance(types, Mapping) else ():
        if name != document.get("head_node_type") and "max_workers" not in kind:
            yield Problem(("available_node_types", name, "max_workers"), "is missing, and then 2")
    if "max_workers" not in document:
        yield Problem(("max_workers",), "is missing, and then 2 for all groups together")
    if not document.get("setup_commands"):
        yield Problem(("setup_commands",), "are empty: a provider's own install a nightly Ray")
    for key in START:
        commands = document.get(key) or ()
        if not any("ray start" in str(command) for command in commands):
            yield Problem((key,), "start no Ray")
        for at, command in enumerate(commands):
            yield from ray_start_problems(str(command), (key, at))
            if "ray start" in str(command) and "RAY_AUTH_MODE=token" not in str(command):
                yield Problem((key, at), "starts Ray without RAY_AUTH_MODE=token: who reaches it runs what he wants")


def _with_detected_resources(config: Mapping[str, Any]) -> dict[str, Any]:
    """AWS's provider fills in the resources of its instance types before Ray validates them; no other does."""
    types = config["available_node_types"]
    if config["provider"].get("type") == "aws":
        types = {name: {"resources": {}, **kind} for name, kind in types.items()}
    return {**config, "available_node_types": types}
