"""Typical mistakes in KubeRay's RayCluster, or in that of a RayJob: fields, groups, pods, versions."""

from __future__ import annotations

from tests.cluster_files.mistakes import (
    BOX,
    CRON,
    ENCODE,
    GONE,
    HEAD,
    KUEUE,
    POD,
    PRE,
    RC,
    VOLCANO,
    WHERE,
    WHERE_BOX,
    J,
    Mistake,
    Renamed,
    instead,
)

MISTAKES = {
    # Fields and values
    "a misspelled field of the job": Mistake(
        PRE, {"spec.backoffLimit": Renamed("backoffLimits")}, "spec.backoffLimits", "no such field.*backoffLimit"
    ),
    "a misspelled field of a group": Mistake(
        PRE, {f"{ENCODE}.maxReplicas": Renamed("maxReplica")}, f"{WHERE}.maxReplica", "did you mean maxReplicas"
    ),
    "a misspelled field of a pod": Mistake(
        PRE, {f"{POD}.tolerations": Renamed("toleration")}, f"{WHERE}.template.spec.toleration", "mean tolerations"
    ),
    "a misspelled field of a container": Mistake(
        PRE, {f"{BOX}.volumeMounts": Renamed("volumesMounts")}, f"{WHERE_BOX}.volumesMounts", "mean volumeMounts"
    ),
    "a field that stands one level too high": Mistake(
        PRE, {"spec.workerGroupSpecs": []}, "spec.workerGroupSpecs", "no such field.*--crds"
    ),
    "a misspelled field of the metadata": Mistake(
        KUEUE, {"metadata.labels": Renamed("label")}, "metadata.label", "did you mean labels"
    ),
    "a misspelled kind": Mistake(RC, {"kind": "RayClusters"}, "kind", "RayClusters is not known.*RayCluster"),
    "an old version of the API": Mistake(RC, {"apiVersion": "ray.io/v1alpha1"}, "apiVersion", "must be ray.io/v1"),
    "a field that is missing": Mistake(PRE, {"spec.entrypoint": GONE}, "spec.entrypoint", "is missing"),
    "a number that is a text": Mistake(
        PRE, {f"{ENCODE}.maxReplicas": "16"}, f"{WHERE}.maxReplicas", "'16' is not a whole number, without quotes"
    ),
    "a text that is a number": Mistake(
        RC,
        {"spec.headGroupSpec.rayStartParams.num-cpus": 0},
        "spec.headGroupSpec.rayStartParams.num-cpus",
        "0 is not a text; put it in quotes",
    ),
    "a value that is none": Mistake(
        RC, {"spec.autoscalerOptions.upscalingMode": "Agressive"}, "spec.autoscalerOptions.upscalingMode", "Aggressive"
    ),
    "an amount that is none": Mistake(
        PRE, {f"{BOX}.resources.limits.memory": "40GB"}, f"{WHERE_BOX}.resources.limits.memory", "write e.g..*16Gi"
    ),
    "a name with an underscore": Mistake(RC, {"metadata.name": "diff_synth"}, "metadata.name", "dashes"),
    "a name of a cluster that is too long": Mistake(RC, {"metadata.name": "d" * 54}, "metadata.name", "may have 53"),
    "a name of a job that is too long": Mistake(PRE, {"metadata.name": "d" * 48}, "metadata.name", "48.*may have 47"),
    "a name of a nightly job that is too long": Mistake(CRON, {"metadata.name": "d" * 37}, "metadata.name", "have 36"),
    # Groups and scaling
    "a minimum above the maximum": Mistake(
        PRE, {f"{ENCODE}.minReplicas": 17}, f"{WHERE}.minReplicas", "17 is above maxReplicas, 16"
    ),
    "a start outside of the bounds": Mistake(
        PRE, {f"{ENCODE}.replicas": 17}, f"{WHERE}.replicas", "17 is outside of minReplicas to maxReplicas, 0 to 16"
    ),
    "no autoscaling": Mistake(
        PRE,
        {
            f"{J}.enableInTreeAutoscaling": GONE,
            f"{J}.autoscalerOptions": GONE,
            f"{ENCODE}.idleTimeoutSeconds": GONE,
        },
        f"{WHERE}.replicas",
        "stays at 0 without enableInTreeAutoscaling",
    ),
    "options of an autoscaler that is not there": Mistake(
        KUEUE, {f"{J}.autoscalerOptions": {"version": "v2"}}, f"{J}.autoscalerOptions", "enableInTreeAutoscaling: true"
    ),
    "an idle time that the old autoscaler does not know": Mistake(
        PRE,
        {f"{J}.autoscalerOptions.version": "v1"},
        f"{WHERE}.idleTimeoutSeconds",
        "needs autoscalerOptions.version: v2",
    ),
    "a priority without a version of the autoscaler": Mistake(
        VOLCANO, {f"{ENCODE}.priority": 1}, f"{WHERE}.priority", "needs autoscalerOptions.version: v2"
    ),
    "a pod that restarts by itself": Mistake(
        PRE, {f"{POD}.restartPolicy": "Always"}, f"{WHERE}.template.spec.restartPolicy", "must be Never"
    ),
    "two groups of one name": Mistake(
        RC, {"spec.workerGroupSpecs.1.groupName": "encode"}, "spec.workerGroupSpecs", "2 groups are named encode; give"
    ),
    "labels where KubeRay refuses them": Mistake(
        PRE,
        {f"{ENCODE}.rayStartParams.labels": "stage=encode"},
        f"{WHERE}.rayStartParams.labels",
        "is refused; use the field labels",
    ),
    "a label that is none": Mistake(
        PRE, {f"{ENCODE}.labels.rack": "a b"}, f"{WHERE}.labels.rack", "'a b' is no label; use letters"
    ),
    "resources said twice": Mistake(
        PRE,
        {f"{ENCODE}.resources": {"GPU": "1"}, f"{ENCODE}.rayStartParams.num-gpus": "1"},
        f"{WHERE}.rayStartParams.num-gpus",
        "is refused beside the group's resources.*GPU",
    ),
    "a parameter that ray start does not have": Mistake(
        PRE, {f"{ENCODE}.rayStartParams.num-cpu": "4"}, f"{WHERE}.rayStartParams", "ray start: No such option.*num-cpu"
    ),
    "no cpu that Ray could count": Mistake(
        PRE,
        {f"{BOX}.resources.limits.cpu": GONE, f"{BOX}.resources.requests.cpu": GONE},
        f"{WHERE_BOX}.resources",
        "names no cpu.*set limits.cpu",
    ),
    # Pods
    "a mount without a volume": Mistake(
        PRE,
        {f"{BOX}.volumeMounts.0.name": "share"},
        f"{WHERE_BOX}.volumeMounts[0].name",
        "no volume 'share' in this pod; did you mean shared",
    ),
    "a volume without a mount": Mistake(
        PRE, {f"{BOX}.volumeMounts.1": GONE}, f"{WHERE}.template.spec.volumes[1]", "scratch is mounted by no container"
    ),
    "GPUs asked for that are not the limit": Mistake(
        PRE,
        {f"{BOX}.resources.requests.nvidia~com/gpu": "2"},
        f"{WHERE_BOX}.resources.requests.nvidia.com/gpu",
        "2 GPUs are asked for and the limit is 1; they must be equal",
    ),
    "GPUs without a limit": Mistake(
        PRE,
        {f"{BOX}.resources.limits.nvidia~com/gpu": GONE},
        f"{WHERE_BOX}.resources.limits.nvidia.com/gpu",
        "are given by their limit",
    ),
    "a misspelled resource": Mistake(
        PRE,
        {f"{BOX}.resources.limits.nvidia~com/gpu": Renamed("nvidia.com/gpus")},
        f"{WHERE_BOX}.resources.limits.nvidia.com/gpus",
        "did you mean nvidia.com/gpu",
    ),
    "more memory asked for than allowed": Mistake(
        PRE, {f"{BOX}.resources.requests.memory": "41Gi"}, f"{WHERE_BOX}.resources.requests.memory", "above the limit"
    ),
    "no limit of memory": Mistake(
        PRE, {f"{BOX}.resources.limits.memory": GONE}, f"{WHERE_BOX}.resources.limits.memory", "is missing.*set it"
    ),
    "root": Mistake(
        PRE, {f"{POD}.securityContext": GONE}, f"{WHERE}.template.spec.securityContext", "root; set runAsNonRoot"
    ),
    "a secret in the clear": Mistake(
        PRE, {f"{BOX}.env.2": {"name": "HF_TOKEN", "value": "hf_x"}}, f"{WHERE_BOX}.env[2]", "clear.*secretKeyRef"
    ),
    "a warning longer than the grace": Mistake(
        PRE,
        {f"{POD}.terminationGracePeriodSeconds": 60},
        f"{WHERE_BOX}.lifecycle.preStop",
        "tells Ray of 100 s, but the pod is killed after terminationGracePeriodSeconds, 60; say less",
    ),
    "a misspelled option of a hook": Mistake(
        PRE,
        {f"{BOX}.lifecycle.preStop.exec.command.2": instead("--deadline-remaining-seconds", "--deadline-seconds")},
        f"{WHERE_BOX}.lifecycle.preStop.exec.command",
        "ray drain-node: No such option.*--deadline-seconds",
    ),
    # Versions
    "another Ray than the tested one": Mistake(
        PRE, {f"{J}.rayVersion": "2.59.0"}, f"{J}.rayVersion", "2.59.0 is not the tested version of Ray, 2.60.0"
    ),
    "an image of another version": Mistake(
        PRE, {f"{BOX}.image": "r.example.com/ray-diffsynth:0.0.9-gpu"}, f"{WHERE_BOX}.image", "0.0.9, not the tested"
    ),
    "an image of another Ray": Mistake(
        RC,
        {f"{HEAD}.containers.0.image": "rayproject/ray:2.55.0"},
        f"{HEAD}.containers[0].image",
        "not.*2.60.0",
    ),
    "an image without a version": Mistake(
        PRE, {f"{BOX}.image": "r.example.com/ray-diffsynth"}, f"{WHERE_BOX}.image", "names no version.*give a tag"
    ),
    "an image without CUDA on GPUs": Mistake(
        PRE, {f"{BOX}.image": instead("-gpu", "-cpu")}, f"{WHERE_BOX}.image", "no CUDA.*use the tag with gpu"
    ),
    # Who may do what
    "no token": Mistake(RC, {"spec.authOptions": GONE}, "spec.authOptions.mode", "; write authOptions"),
    "a job port for everyone": Mistake(
        RC, {"spec.headGroupSpec.serviceType": "LoadBalancer"}, "spec.headGroupSpec.serviceType", "use ClusterIP"
    ),
}
