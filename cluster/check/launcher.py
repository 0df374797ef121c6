"""Files of Ray's cluster launcher: by Ray's own validation, and what that does not look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

from cluster.check.problem import Problem, mapping
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
    for key in START:
        commands = [str(command) for command in document.get(key) or ()]
        if not any("ray start" in command for command in commands):
            yield Problem((key,), "start no Ray; end them with ray start …")
        for at, command in enumerate(commands):
            yield from ray_start_problems(command, (key, at))
            if "ray start" in command and _TOKEN not in command:
                message = f"starts Ray without a token: whoever reaches it can run anything; export {_TOKEN} before it"
                yield Problem((key, at), message)


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
