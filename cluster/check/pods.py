"""Pods that Kubernetes takes, but that never start, start with less than they ask for, or tell their secrets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.check.problem import Place, Problem, mapping, walk
from cluster.check.runtime_env import SECRET
from ray_diffsynth.errors import did_you_mean

GPU = "nvidia.com/gpu"
_SUFFIXES = ("", "k", "M", "G", "T")
_FACTORS = {"m": 1e-3, **{name: 1e3**power for power, name in enumerate(_SUFFIXES)}}
_FACTORS |= {f"{name[0].upper()}i": 2.0 ** (10 * power) for power, name in enumerate(_SUFFIXES) if name}
_RESOURCES = ("cpu", "memory", "ephemeral-storage", GPU)


def amount(quantity: Any) -> float:
    """A quantity of Kubernetes as a number: `500m` is 0.5, `1Ki` 1024. Raises ValueError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)", str(quantity))
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
        yield from _mounts(pod, place)
        for at, container in enumerate(map(mapping, pod["containers"])):
            here = (*place, "containers", at)
            yield from _resources(mapping(container.get("resources")), (*here, "resources"))
            yield from _environment(container, here)
            yield from _hook(container, here, grace=pod.get("terminationGracePeriodSeconds", 30))
            security = {**mapping(pod.get("securityContext")), **mapping(container.get("securityContext"))}
            if not security.get("runAsNonRoot") or security.get("runAsUser") == 0:
                yield Problem(
                    (*place, "securityContext"), "runs as root; set runAsNonRoot: true and the runAsUser of the image"
                )
            if security.get("privileged"):
                yield Problem((*here, "securityContext", "privileged"), "gives the whole machine away; leave it out")


def _mounts(pod: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    volumes = [str(mapping(volume).get("name")) for volume in pod.get("volumes") or ()]
    used = set()
    for at, container in enumerate(map(mapping, pod["containers"])):
        paths: Counter[str] = Counter()
        for number, mount in enumerate(map(mapping, container.get("volumeMounts") or ())):
            name, path = str(mount.get("name")), str(mount.get("mountPath"))
            where = (*place, "containers", at, "volumeMounts", number)
            used.add(name)
            paths[path] += 1
            if name not in volumes:
                message = f"there is no volume {name!r} in this pod; {did_you_mean(name, volumes)}"
                yield Problem((*where, "name"), message)
            if not path.startswith("/"):
                yield Problem((*where, "mountPath"), f"{path} is relative; begin it with a slash")
            if paths[path] == 2:
                yield Problem((*where, "mountPath"), f"{path} is mounted twice; give each its own path")
    for number, volume in enumerate(volumes):
        if volume not in used <= set(volumes):
            message = f"{volume} is mounted by no container; mount it, or leave it out"
            yield Problem((*place, "volumes", number), message)
        if volumes.index(volume) < number:
            yield Problem((*place, "volumes", number), f"there is another volume {volume}; give each its own name")


def _environment(container: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    for number, variable in enumerate(map(mapping, container.get("env") or ())):
        if SECRET.search(str(variable.get("name"))) and variable.get("value"):
            message = f"{variable['name']} stands here in the clear; take it from a secret by valueFrom.secretKeyRef"
            yield Problem((*place, "env", number), message)
        if "value" in variable and "valueFrom" in variable:
            yield Problem((*place, "env", number), "has both value and valueFrom; leave one out")


def _hook(container: Mapping[str, Any], place: Place, *, grace: Any) -> Iterator[Problem]:
    found = re.search(r"--deadline-remaining-seconds[= ](\d+)", " ".join(stop_command(container)))
    if found and isinstance(grace, int) and int(found[1]) >= grace:
        yield Problem(
            (*place, "lifecycle", "preStop"),
            f"tells Ray of {found[1]} s, but the pod is killed after terminationGracePeriodSeconds, {grace}; say less",
        )


def stop_command(container: Mapping[str, Any]) -> list[str]:
    """What a container runs before it is stopped, word by word."""
    hook = mapping(mapping(container.get("lifecycle")).get("preStop"))
    return [str(word) for word in mapping(hook.get("exec")).get("command") or ()]


def _resources(resources: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    requests, limits = mapping(resources.get("requests")), mapping(resources.get("limits"))
    for name in dict.fromkeys((*requests, *limits)):
        section = "requests" if name in requests else "limits"
        if name not in _RESOURCES and ("/" not in name or name.startswith("nvidia.com/gpu")):
            yield Problem((*place, section, name), f"is no resource of Kubernetes; {did_you_mean(name, _RESOURCES)}")
            continue
        try:
            wanted = amount(requests[name]) if name in requests else None
            most = amount(limits[name]) if name in limits else None
        except ValueError as error:
            yield Problem((*place, section, name), str(error))
            continue
        if name == GPU and most is None:
            yield Problem((*place, "limits", name), "is missing: GPUs are given by their limit; write it there too")
        elif name == GPU and wanted is not None and wanted != most:
            message = f"{requests[name]} GPUs are asked for and the limit is {limits[name]}; they must be equal"
            yield Problem((*place, "requests", name), message)
        elif wanted is not None and most is not None and wanted > most:
            yield Problem((*place, "requests", name), f"{requests[name]} is above the limit, {limits[name]}")
    if "memory" not in limits:
        message = "is missing: Ray's own guard then looks at the whole machine, and the pod is killed first; set it"
        yield Problem((*place, "limits", "memory"), message)
