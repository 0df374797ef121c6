"""Pods that Kubernetes takes, but that never start, start with less than they ask for, or tell their secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.check.problem import Place, Problem, walk

GPU = "nvidia.com/gpu"
SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|_KEY)$")
_FACTORS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_FACTORS["Ti"] = 2.0**40


def amount(quantity: Any) -> float:
    """A quantity of Kubernetes as a number: `500m` is 0.5, `1Ki` 1024. Raises ValueError."""
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(quantity))
    if found is None or found[2] not in _FACTORS:
        raise ValueError(f"{quantity!r} is no quantity; write e.g. 500m, 4 or 16Gi")
    return float(found[1]) * _FACTORS[found[2]]


def pods_in(document: Mapping[str, Any]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The specification of each pod in a document: whatever holds `containers`."""
    for place, value in walk(document):
        if isinstance(value, Mapping) and isinstance(value.get("containers"), list):
            yield place, value


def pod_problems(document: Mapping[str, Any]) -> Iterator[Problem]:
    """Mounts without a volume, requests that are not the limits, users, secrets in the clear."""
    for place, pod in pods_in(document):
        volumes = {volume.get("name") for volume in pod.get("volumes") or ()}
        for at, container in enumerate(pod["containers"]):
            here = (*place, "containers", at)
            for number, mount in enumerate(container.get("volumeMounts") or ()):
                if mount.get("name") not in volumes:
                    known = ", ".join(sorted(map(str, volumes))) or "none"
                    message = f"there is no volume {mount.get('name')!r} in this pod; volumes there: {known}"
                    yield Problem((*here, "volumeMounts", number), message)
            yield from _resources(container.get("resources") or {}, (*here, "resources"))
            for number, variable in enumerate(container.get("env") or ()):
                if SECRET.search(str(variable.get("name"))) and variable.get("value"):
                    yield Problem(
                        (*here, "env", number),
                        f"{variable['name']} stands here in the clear; use valueFrom.secretKeyRef",
                    )
        security = pod.get("securityContext") or {}
        if not security.get("runAsNonRoot"):
            yield Problem((*place, "securityContext"), "runs as root; set runAsNonRoot: true and runAsUser")


def _resources(resources: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for name in dict.fromkeys((*requests, *limits)):
        try:
            wanted, most = (
                None if given is None else amount(given) for given in (requests.get(name), limits.get(name))
            )
        except ValueError as error:
            yield Problem((*place, name), str(error))
            continue
        if name == GPU and wanted != most and (wanted is not None or most is None):
            yield Problem((*place, "requests", name), "of GPUs must be equal to the limit")
        elif wanted is not None and most is not None and wanted > most:
            yield Problem((*place, "requests", name), f"{requests[name]} is above the limit, {limits[name]}")
    if "memory" not in limits:
        message = "has no limit of memory: Ray's own guard looks at the whole machine, and the pod is killed unasked"
        yield Problem((*place, "limits"), message)
