"""What KubeRay's operator (1.7), Kueue and Volcano refuse or ignore of a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.check.kuberay import clusters_of, jobs_of
from cluster.check.problem import Place, Problem, mapping
from cluster.check.schedule import schedule_problems

KUEUE = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"
VOLCANO = "volcano.sh/queue-name"
MOST_GROUPS = 7
"""Groups of workers that Kueue takes."""
CLUSTER_NAME = "ray.io/cluster"


def rayjob_problems(document: Mapping[str, Any]) -> Iterator[Problem]:
    """The rules for the job of a RayJob or a RayCronJob, for its schedule, and for queues."""
    for place, spec in jobs_of(document):
        yield from _ends(spec, place)
        yield from _cluster_of_job(spec, place)
        yield from _submission(spec, place)
    if document.get("kind") == "RayCronJob":
        yield from schedule_problems(mapping(document.get("spec")))
    metadata = mapping(document.get("metadata"))
    labels = mapping(metadata.get("labels"))
    if KUEUE in labels:
        elastic = mapping(metadata.get("annotations")).get(ELASTIC) == "true"
        yield from _kueue(document, elastic=elastic)
    if VOLCANO in labels:
        yield from _volcano(document)


def _ends(spec: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    if spec.get("shutdownAfterJobFinishes"):
        return
    for field in ("ttlSecondsAfterFinished", "suspend"):
        if spec.get(field):
            yield Problem((*place, field), "needs shutdownAfterJobFinishes: true")
    if "rayClusterSpec" in spec:
        message = "is not true: the cluster stays, with its head at least, when the job has ended"
        yield Problem((*place, "shutdownAfterJobFinishes"), message)


def _cluster_of_job(spec: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    selector = mapping(spec.get("clusterSelector"))
    if bool(selector) == ("rayClusterSpec" in spec):
        yield Problem(place, "give one of rayClusterSpec, a cluster of its own, and clusterSelector, one that is there")
    if selector and not selector.get(CLUSTER_NAME):
        yield Problem((*place, "clusterSelector"), f"names no cluster; write {{{CLUSTER_NAME}: NAME}}")
    if selector and spec.get("backoffLimit"):
        yield Problem((*place, "backoffLimit"), "makes a new cluster for each try, which clusterSelector has not")
    if selector and spec.get("suspend"):
        yield Problem((*place, "suspend"), "is refused with clusterSelector; leave it out")


def _submission(spec: Mapping[str, Any], place: Place) -> Iterator[Problem]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield Problem((*place, "backoffLimit"), "is refused with submissionMode: InteractiveMode")
    if mode != "K8sJobMode":
        for field in ("submitterPodTemplate", "submitterConfig"):
            if field in spec:
                yield Problem((*place, field), f"is refused or ignored with submissionMode: {mode}; leave it out")
    pod = mapping(mapping(spec.get("submitterPodTemplate")).get("spec"))
    if pod and pod.get("restartPolicy") not in ("Never", "OnFailure"):
        where = (*place, "submitterPodTemplate", "spec", "restartPolicy")
        yield Problem(where, "must be Never or OnFailure: the submitter is a Job of Kubernetes")


def _kueue(document: Mapping[str, Any], *, elastic: bool) -> Iterator[Problem]:
    for place, spec in jobs_of(document):
        for field in ("suspend", "shutdownAfterJobFinishes"):
            if not spec.get(field):
                yield Problem((*place, field), f"must be true with the label {KUEUE}")
    for place, spec in clusters_of(document):
        groups = spec.get("workerGroupSpecs") or ()
        if spec.get("enableInTreeAutoscaling") and not elastic:
            message = f"is refused by Kueue, which counts pods beforehand; fix replicas, or annotate {ELASTIC}: 'true'"
            yield Problem((*place, "enableInTreeAutoscaling"), message)
        if len(groups) > MOST_GROUPS:
            yield Problem((*place, "workerGroupSpecs"), f"has {len(groups)} groups; Kueue takes {MOST_GROUPS}")
        for at, group in enumerate(groups):
            if mapping(group).get("groupName") == "head":
                where = (*place, "workerGroupSpecs", at, "groupName")
                yield Problem(where, "is Kueue's name for the head's pods; choose another")


def _volcano(document: Mapping[str, Any]) -> Iterator[Problem]:
    for place, spec in clusters_of(document):
        groups = [mapping(group) for group in spec.get("workerGroupSpecs") or ()]
        if spec.get("enableInTreeAutoscaling") and not any(group.get("minReplicas") for group in groups):
            message = "are all 0, so that Volcano's gang is the head alone; set minReplicas to what must start together"
            yield Problem((*place, "workerGroupSpecs"), message)
