"""What KubeRay's operator (1.7) refuses after the API server has taken a file, when only an event tells of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.check.problem import Place, Problem, mapping

LONGEST_NAMES = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
"""Letters of a resource's name, so that those that the operator makes of it fit Kubernetes' 63."""
OWN_FIELDS = {"num-cpus": "CPU", "num-gpus": "GPU", "memory": "memory", "resources": "…"}
"""Parameter of `ray start` -> the entry of a group's `resources` that says the same; both at once are refused."""
OLDEST_WITH_TOKENS = (2, 52)
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_V2 = "RAY_enable_autoscaler_v2"


def operator_problems(document: Mapping[str, Any]) -> Iterator[Problem]:
    """The rules for names and Ray clusters, in a RayCluster, a RayJob or a RayCronJob."""
    kind, name = str(document.get("kind")), str(mapping(document.get("metadata")).get("name", ""))
    if len(name) > (most := LONGEST_NAMES.get(kind, 63)):
        yield Problem(("metadata", "name"), f"has {len(name)} letters; the name of a {kind} may have {most}")
    for place, spec in clusters_of(document):
        yield from _cluster(spec, place)


def clusters_of(document: Mapping[str, Any]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The specification of each Ray cluster in a document, with its place."""
    if document.get("kind") == "RayCluster":
        yield ("spec",), mapping(document.get("spec"))
    for place, job in jobs_of(document):
        if "rayClusterSpec" in job:
            yield (*place, "rayClusterSpec"), mapping(job["rayClusterSpec"])


def jobs_of(document: Mapping[str, Any]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The specification of each job in a document, with its place."""
    spec = mapping(document.get("spec"))
    if document.get("kind") == "RayJob":
        yield ("spec",), spec
    elif document.get("kind") == "RayCronJob":
        yield ("spec", "jobTemplate"), mapping(spec.get("jobTemplate"))


def groups_of(spec: Mapping[str, Any], place: Place) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The head's group and those of the workers."""
    yield (*place, "headGroupSpec"), mapping(spec.get("headGroupSpec"))
    for at, group in enumerate(spec.get("workerGroupSpecs") or ()):
        yield (*place, "workerGroupSpecs", at), mapping(group)


def containers_of(group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The containers of a group's pod, the one of Ray first."""
    pod = mapping(mapping(group.get("template")).get("spec"))
    return [mapping(container) for container in pod.get("containers") or ()]


def _cluster(spec: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    scales = bool(spec.get("enableInTreeAutoscaling"))
    options = mapping(spec.get("autoscalerOptions"))
    version = str(options.get("version", "v2"))
    if options and not scales:
        yield Problem((*place, "autoscalerOptions"), "nothing scales without enableInTreeAutoscaling: true")
    yield from _access(spec, place)
    workers = [mapping(group) for group in spec.get("workerGroupSpecs") or ()]
    for name, times in Counter(group.get("groupName") for group in workers).items():
        if times > 1:
            yield Problem((*place, "workerGroupSpecs"), f"{times} groups are named {name}; give each its own name")
    for where, group in groups_of(spec, place):
        yield from _group(group, where, scales=scales, version=version)
    for at, group in enumerate(workers):
        said = str(options.get("version"))
        yield from _replicas(group, (*place, "workerGroupSpecs", at), scales=scales, version=said)


def _access(spec: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    """Who can reach the cluster, and with that run anything."""
    if mapping(spec.get("authOptions")).get("mode") != "token":
        message = "is not token: whoever reaches port 8265 can run anything; write authOptions: {mode: token}"
        yield Problem((*place, "authOptions", "mode"), message)
    found = re.match(r"(\d+)\.(\d+)", str(spec.get("rayVersion", "")))
    if found is None or (int(found[1]), int(found[2])) < OLDEST_WITH_TOKENS:
        yield Problem((*place, "rayVersion"), f"{spec.get('rayVersion')!r}: tokens need Ray 2.52 or newer")
    if (kind := mapping(spec.get("headGroupSpec")).get("serviceType")) in ("LoadBalancer", "NodePort"):
        yield Problem(
            (*place, "headGroupSpec", "serviceType"),
            f"{kind} opens the job port to others; use ClusterIP and kubectl port-forward",
        )


def _group(group: Mapping[str, Any], place: Place, *, scales: bool, version: str) -> Iterator[Problem]:
    started = mapping(group.get("rayStartParams"))
    if "labels" in started:
        yield Problem((*place, "rayStartParams", "labels"), "is refused; use the field labels of the group")
    for parameter in sorted(started.keys() & OWN_FIELDS.keys()):
        if group.get("resources"):
            yield Problem(
                (*place, "rayStartParams", parameter),
                f"is refused beside the group's resources; say it there, by {OWN_FIELDS[parameter]}",
            )
    for key, value in mapping(group.get("labels")).items():
        if not _LABEL.fullmatch(key.rsplit("/", 1)[-1]) or (value and not _LABEL.fullmatch(value)):
            message = f"{value!r} is no label; use letters, digits, dashes and dots, at most 63"
            yield Problem((*place, "labels", key), message)
    pod = mapping(mapping(group.get("template")).get("spec"))
    if scales and version == "v2" and pod.get("restartPolicy", "Never") != "Never":
        yield Problem((*place, "template", "spec", "restartPolicy"), "must be Never with the autoscaler v2")
    containers = containers_of(group)
    first = mapping(containers[0]) if containers else {}
    resources = mapping(first.get("resources"))
    known = {**mapping(resources.get("requests")), **mapping(resources.get("limits"))}
    if not ("cpu" in known or "num-cpus" in started or "CPU" in mapping(group.get("resources"))):
        where = (*place, "template", "spec", "containers", 0, "resources")
        yield Problem(where, "names no cpu: Ray cannot tell how many this group has; set limits.cpu")
    if any(mapping(variable).get("name") == _V2 for variable in first.get("env") or ()):
        where = (*place, "template", "spec", "containers", 0, "env")
        yield Problem(where, f"{_V2} is refused beside autoscalerOptions.version; leave it out")


def _replicas(group: Mapping[str, Any], place: Place, *, scales: bool, version: str) -> Iterator[Problem]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    now = group.get("replicas", least)
    if not isinstance(least, int) or not isinstance(most, int) or not isinstance(now, int):
        return  # the schema tells it
    if least > most:
        yield Problem((*place, "minReplicas"), f"{least} is above maxReplicas, {most}")
    elif not least <= now <= most:
        yield Problem((*place, "replicas"), f"{now} is outside of minReplicas to maxReplicas, {least} to {most}")
    if not scales and not least == now == most:
        message = f"stays at {now} without enableInTreeAutoscaling: true; set it, or all three numbers to the same"
        yield Problem((*place, "replicas"), message)
    for field in ("idleTimeoutSeconds", "priority"):
        if group.get(field) and (version != "v2" or not scales):
            yield Problem((*place, field), "of a group needs autoscalerOptions.version: v2, said in words")
    if scales and group.get("suspend"):
        yield Problem((*place, "suspend"), "of a group is refused with an autoscaler; set maxReplicas: 0")
