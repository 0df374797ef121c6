"""What KubeRay's operator (1.7) refuses after the API server has taken a file, when only an event tells of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.check.problem import Place, Problem

LONGEST_NAMES = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
"""Letters of a resource's name, so that those that the operator makes of it fit Kubernetes' 63."""
KUEUE = "kueue.x-k8s.io/queue-name"
OWN_FIELDS = {"num-cpus": "resources.CPU", "num-gpus": "resources.GPU", "resources": "resources"}
"""Parameter of `ray start` -> the field of a group that says the same; both at once are refused."""


def operator_problems(document: Mapping[str, Any]) -> Iterator[Problem]:
    """The rules for a RayCluster, a RayJob or a RayCronJob, in its cluster and its job."""
    kind, name = str(document.get("kind")), str(_dict(document.get("metadata")).get("name", ""))
    if len(name) > (most := LONGEST_NAMES.get(kind, 63)):
        yield Problem(("metadata", "name"), f"{len(name)} letters; the name of a {kind} may have {most}")
    labels = _dict(_dict(document.get("metadata")).get("labels"))
    for place, spec in clusters_of(document):
        yield from _cluster(spec, place)
    for place, spec in jobs_of(document):
        yield from _job(spec, place, labels)


def clusters_of(document: Mapping[str, Any]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The specification of each Ray cluster in a document, with its place."""
    if document.get("kind") == "RayCluster":
        yield ("spec",), _dict(document.get("spec"))
    for place, job in jobs_of(document):
        if "rayClusterSpec" in job:
            yield (*place, "rayClusterSpec"), _dict(job["rayClusterSpec"])


def jobs_of(document: Mapping[str, Any]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The specification of each job in a document, with its place."""
    spec = _dict(document.get("spec"))
    if document.get("kind") == "RayJob":
        yield ("spec",), spec
    elif document.get("kind") == "RayCronJob":
        yield ("spec", "jobTemplate"), _dict(spec.get("jobTemplate"))


def groups_of(spec: Mapping[str, Any], place: Place) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The head's group and those of the workers."""
    yield (*place, "headGroupSpec"), _dict(spec.get("headGroupSpec"))
    for at, group in enumerate(spec.get("workerGroupSpecs") or ()):
        yield (*place, "workerGroupSpecs", at), _dict(group)


def _cluster(spec: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    scales = bool(spec.get("enableInTreeAutoscaling"))
    options = _dict(spec.get("autoscalerOptions"))
    version = options.get("version", "v2")
    if options and not scales:
        yield Problem((*place, "autoscalerOptions"), "nothing scales without enableInTreeAutoscaling: true")
    if _dict(spec.get("authOptions")).get("mode") == "token" and not spec.get("rayVersion"):
        yield Problem((*place, "authOptions"), "mode token needs rayVersion")
    workers = [_dict(group) for group in spec.get("workerGroupSpecs") or ()]
    for name, times in Counter(group.get("groupName") for group in workers).items():
        if times > 1:
            yield Problem((*place, "workerGroupSpecs"), f"{times} groups are named {name}; give each its own name")
    for where, group in groups_of(spec, place):
        started = _dict(group.get("rayStartParams"))
        if "labels" in started:
            yield Problem((*where, "rayStartParams", "labels"), "is refused; use the group's field labels")
        for parameter in sorted(started.keys() & OWN_FIELDS.keys()):
            if group.get("resources"):
                yield Problem(
                    (*where, "rayStartParams", parameter),
                    f"stands beside the group's resources; leave one out ({OWN_FIELDS[parameter]} says the same)",
                )
        pod = _dict(_dict(group.get("template")).get("spec"))
        if scales and version == "v2" and pod.get("restartPolicy", "Always") != "Never":
            yield Problem((*where, "template", "spec", "restartPolicy"), "the autoscaler v2 needs restartPolicy: Never")
    for at, group in enumerate(workers):
        yield from _replicas(group, (*place, "workerGroupSpecs", at), scales, str(version))


def _replicas(group: Mapping[str, Any], place: Place, scales: bool, version: str) -> Iterator[Problem]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    now = group.get("replicas", least)
    if not all(isinstance(number, int) for number in (least, most, now)):
        return  # the schema tells it
    assert least is not None and most is not None and now is not None
    if least > most:
        yield Problem((*place, "minReplicas"), f"{least} is above maxReplicas, {most}")
    elif not least <= now <= most:
        yield Problem((*place, "replicas"), f"{now} is outside of minReplicas..maxReplicas, {least}..{most}")
    if not scales and least < most:
        yield Problem((*place, "maxReplicas"), "nothing scales without enableInTreeAutoscaling: true")
    if "idleTimeoutSeconds" in group and version != "v2":
        yield Problem((*place, "idleTimeoutSeconds"), "of a group needs the autoscaler v2")


def _job(spec: Mapping[str, Any], place: Place, labels: Mapping[str, Any]) -> Iterator[Problem]:
    shuts_down = bool(spec.get("shutdownAfterJobFinishes"))
    selects = bool(spec.get("clusterSelector"))
    if selects == ("rayClusterSpec" in spec):
        yield Problem(
            place, "give one of rayClusterSpec (a cluster of its own) and clusterSelector (one that is there)"
        )
    if spec.get("ttlSecondsAfterFinished") and not shuts_down:
        yield Problem((*place, "ttlSecondsAfterFinished"), "needs shutdownAfterJobFinishes: true")
    if selects and spec.get("backoffLimit"):
        yield Problem((*place, "backoffLimit"), "makes a new cluster for each try, which clusterSelector has not")
    if spec.get("suspend") and not shuts_down:
        yield Problem((*place, "suspend"), "needs shutdownAfterJobFinishes: true")
    if KUEUE in labels and not (shuts_down and spec.get("suspend")):
        yield Problem(place, f"a job with the label {KUEUE} needs suspend: true and shutdownAfterJobFinishes: true")
    if (tail := _after_the_job(str(spec.get("entrypoint", "")))) is not None:
        yield Problem(
            (*place, "entrypoint"),
            f"goes into a shell as it stands, so that {tail!r} runs in the submitter's pod; write sh -c '…' around it",
        )


def _after_the_job(entrypoint: str) -> str | None:
    """What follows the first `&&`, `||`, `;`, `|` or line break outside of quotes; None if nothing does."""
    bare = re.sub(r"'[^']*'|\"(?:\\.|[^\"\\])*\"", lambda found: "x" * len(found[0]), entrypoint.strip())
    found = re.search(r"&&|\|\||[;|\n]", bare)
    return entrypoint.strip()[found.end() :].strip() or None if found else None


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
