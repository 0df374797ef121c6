"""Typical mistakes in a manifest, each made in a file of ours: each is told, with the place, the reason and the fix."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from cluster.check.__main__ import check_document
from tests.cluster_files.manifests import read

GONE = object()
"""In place of a value: the key is not there."""


class Renamed(NamedTuple):
    """In place of a value: the key has another name."""

    name: str


class Mistake(NamedTuple):
    """file: of cluster/kuberay. changes: path -> new value, or a function of the old one. place, told: what is said."""

    file: str
    changes: dict[str, Any]
    place: str
    told: str


def changed(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The document with other values. A path has dots, and numbers for entries of lists."""
    for path, value in changes.items():
        *above, last = (int(key) if key.isdigit() else key.replace("~", ".") for key in path.split("."))
        inner: Any = document
        for key in above:
            inner = inner.setdefault(key, {}) if isinstance(inner, dict) else inner[key]
        if value is GONE:
            del inner[last]
        elif isinstance(value, Renamed):
            inner[value.name] = inner.pop(last)
        elif callable(value):
            inner[last] = value(inner[last])
        elif isinstance(inner, list) and last == len(inner):
            inner.append(value)
        else:
            inner[last] = value
    return document


def instead(old: str, new: str) -> Callable[[str], str]:
    """A text with another part."""
    return lambda text: text.replace(old, new)


J = "spec.rayClusterSpec"
ENCODE = f"{J}.workerGroupSpecs.0"
POD = f"{ENCODE}.template.spec"
BOX = f"{POD}.containers.0"
WHERE = "spec.rayClusterSpec.workerGroupSpecs[0]"
WHERE_BOX = f"{WHERE}.template.spec.containers[0]"
HEAD = "spec.headGroupSpec.template.spec"
PRE, RC, CRON, KUEUE, VOLCANO = "preprocess.yaml", "raycluster.yaml", "nightly.yaml", "kueue.yaml", "volcano.yaml"
AWS = "../launcher/aws.yaml"

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
    # The job
    "a time to live without an end": Mistake(
        PRE,
        {"spec.shutdownAfterJobFinishes": GONE},
        "spec.ttlSecondsAfterFinished",
        "needs shutdownAfterJobFinishes: true",
    ),
    "both a cluster of its own and another": Mistake(
        PRE, {"spec.clusterSelector": {"ray.io/cluster": "a"}}, "spec", "give one of rayClusterSpec.*clusterSelector"
    ),
    "tries in a cluster that is there": Mistake(
        PRE,
        {"spec.rayClusterSpec": GONE, "spec.clusterSelector": {"ray.io/cluster": "diffsynth"}},
        "spec.backoffLimit",
        "makes a new cluster for each try",
    ),
    "a selector that names no cluster": Mistake(
        PRE,
        {"spec.rayClusterSpec": GONE, "spec.clusterSelector": {"cluster": "a"}, "spec.backoffLimit": 0},
        "spec.clusterSelector",
        "names no cluster; write {ray.io/cluster: NAME}",
    ),
    "a submitter that restarts": Mistake(
        PRE,
        {"spec.submitterPodTemplate.spec.restartPolicy": "Always"},
        "spec.submitterPodTemplate.spec.restartPolicy",
        "must be Never or OnFailure",
    ),
    "a submitter's pod where there is none": Mistake(
        PRE,
        {"spec.submissionMode": "HTTPMode", "spec.submitterConfig": GONE},
        "spec.submitterPodTemplate",
        "with submissionMode: HTTPMode; leave it out",
    ),
    "tries of what a person submits": Mistake(
        PRE,
        {
            "spec.submissionMode": "InteractiveMode",
            "spec.submitterConfig": GONE,
            "spec.submitterPodTemplate": GONE,
        },
        "spec.backoffLimit",
        "refused with submissionMode: InteractiveMode",
    ),
    # The command
    "a misspelled option": Mistake(
        PRE,
        {"spec.entrypoint": instead("--output_path", "--output_pth")},
        "spec.entrypoint",
        "mean output_path",
    ),
    "a required option that is missing": Mistake(
        PRE, {"spec.entrypoint": instead("--model ", "")}, "spec.entrypoint", "preprocess: "
    ),
    "a value that is none of an option": Mistake(
        PRE, {"spec.entrypoint": lambda text: f"{text.strip()} --dtype float9"}, "spec.entrypoint", "dtype"
    ),
    "a job that is none": Mistake(
        PRE,
        {"spec.entrypoint": instead("preprocess", "preproces")},
        "spec.entrypoint",
        "no job.*mean preprocess",
    ),
    "another program": Mistake(
        PRE,
        {"spec.entrypoint": "python main.py"},
        "spec.entrypoint",
        "runs no job.*write ray-diffsynth",
    ),
    "two commands": Mistake(
        PRE,
        {"spec.entrypoint": lambda text: f"{text.strip()} && echo done"},
        "spec.entrypoint",
        "'echo done' runs in the submitter's pod; write sh -c",
    ),
    "a command in two lines": Mistake(
        PRE,
        {"spec.entrypoint": instead(" --dataset", "\n--dataset")},
        "spec.entrypoint",
        "line break.*write sh -c",
    ),
    "a variable of the head": Mistake(
        PRE,
        {"spec.entrypoint": instead("/shared/models", "$MODELS")},
        "spec.entrypoint",
        "MODELS is filled in",
    ),
    "a log of one's own": Mistake(
        PRE, {"spec.entrypoint": lambda text: f"{text.strip()} > log"}, "spec.entrypoint", "> redirects the submitter"
    ),
    "a comment": Mistake(
        PRE, {"spec.entrypoint": lambda text: f"{text.strip()} # all"}, "spec.entrypoint", "a # ends the command"
    ),
    "quotes that do not close": Mistake(
        PRE, {"spec.entrypoint": lambda text: f"{text.strip()} --trigger 'a"}, "spec.entrypoint", "No closing quotation"
    ),
    "a result on the pod's own disk": Mistake(
        PRE,
        {"spec.entrypoint": instead("/shared/cache", "/share/cache")},
        "spec.entrypoint",
        "no volume.*at /shared",
    ),
    "a relative path": Mistake(
        PRE,
        {"spec.entrypoint": instead("/shared/cache", "cache")},
        "spec.entrypoint",
        "relative.*absolute path",
    ),
    "a key that Ray drops": Mistake(
        PRE, {"spec.runtimeEnvYAML": "env_var: {A: b}"}, "spec.runtimeEnvYAML", "no env_var.*did you mean env_vars"
    ),
    "a variable that is a number": Mistake(
        PRE, {"spec.runtimeEnvYAML": "env_vars: {OMP_NUM_THREADS: 1}"}, "spec.runtimeEnvYAML", "1 is no text; put"
    ),
    "a secret on the dashboard": Mistake(
        PRE, {"spec.runtimeEnvYAML": "env_vars: {HF_TOKEN: x}"}, "spec.runtimeEnvYAML", "dashboard; set it in the cont"
    ),
    "a folder of the submitter": Mistake(
        PRE, {"spec.runtimeEnvYAML": "working_dir: ./"}, "spec.runtimeEnvYAML", "submitter's pod; give the URL"
    ),
    "a runtime environment that is none": Mistake(
        PRE, {"spec.runtimeEnvYAML": "pip"}, "spec.runtimeEnvYAML", "is no mapping; write e.g."
    ),
    # The job and its groups
    "a label of no group": Mistake(
        PRE,
        {f"{ENCODE}.labels.stage": "encod"},
        "spec.entrypoint",
        "no group is one with stage=encode; the groups.*; change --node_labels",
    ),
    "a misspelled label": Mistake(
        PRE,
        {"spec.entrypoint": instead('"stage"', '"stages"')},
        "spec.entrypoint",
        "no group is one with stages=encode",
    ),
    "more actors than the group may have": Mistake(
        PRE, {f"{ENCODE}.maxReplicas": 15}, "spec.entrypoint", "asks for 16 times 1 GPU.*starts none.*maxReplicas"
    ),
    "workers larger than the machines": Mistake(
        "train.yaml",
        {"spec.entrypoint": lambda text: f'{text.strip()} --resources \'{{"GPU": 1, "CPU": 65}}\''},
        "spec.entrypoint",
        "needs 8 times 1 GPU, 65 CPU.*cannot become.*lower --num_workers",
    ),
    "a stage that names no machines": Mistake(
        "pipeline.yaml",
        {"spec.entrypoint": instead("""--train.node_labels '{"stage": "train"}'""", "")},
        "spec.entrypoint",
        "train: names no machines.*add --node_labels",
    ),
    "a misspelled option of one stage": Mistake(
        "pipeline.yaml",
        {"spec.entrypoint": instead("--train.num_workers", "--train.num_worker")},
        "spec.entrypoint",
        "did you mean num_workers",
    ),
    "a cache on the pod's own disk": Mistake(
        "pipeline.yaml",
        {"spec.entrypoint": instead("/shared/cache", "/tmp/cache")},
        "spec.entrypoint",
        "--cache_path.*volume",
    ),
    # Schedules and queues
    "a schedule with six fields": Mistake(CRON, {"spec.schedule": "0 0 2 * * *"}, "spec.schedule", "6 fields; write 5"),
    "an hour that no day has": Mistake(
        CRON, {"spec.schedule": "0 24 * * *"}, "spec.schedule", "24 is no hour; .*0 to 23"
    ),
    "a day by another name": Mistake(
        CRON, {"spec.schedule": "0 2 * * MONDAY"}, "spec.schedule", "MONDAY is no day of the week; .*SUN"
    ),
    "a zone in the schedule": Mistake(CRON, {"spec.schedule": "TZ=UTC 0 2 * * 0"}, "spec.schedule", "use timeZone"),
    "a time zone that is none": Mistake(CRON, {"spec.timeZone": "Berlin"}, "spec.timeZone", "write e.g. Etc/UTC"),
    "a queued job that is not suspended": Mistake(
        KUEUE, {"spec.suspend": GONE}, "spec.suspend", "must be true with the label kueue"
    ),
    "a queued job that scales": Mistake(
        KUEUE, {f"{J}.enableInTreeAutoscaling": True}, f"{J}.enableInTreeAutoscaling", "refused by Kueue.*fix replicas"
    ),
    "a gang of the head alone": Mistake(
        VOLCANO,
        {f"{J}.enableInTreeAutoscaling": True, f"{ENCODE}.minReplicas": 0},
        f"{J}.workerGroupSpecs",
        "the head alone; set minReplicas",
    ),
    # Ray's own launcher
    "a misspelled key of the launcher": Mistake(
        AWS, {"upscaling_speed": Renamed("upscaling_sped")}, "", "'upscaling_sped' was unexpected"
    ),
    "a head that is no type of node": Mistake(AWS, {"head_node_type": "heads"}, "", "head_node_type"),
    "a group whose size is left to Ray": Mistake(
        AWS,
        {"available_node_types.train.max_workers": GONE},
        "available_node_types.train.max_workers",
        "Ray then takes 2; say how many",
    ),
    "a cluster whose size is left to Ray": Mistake(AWS, {"max_workers": GONE}, "max_workers", "takes 2.*say how many"),
    "the provider's own installation": Mistake(AWS, {"setup_commands": []}, "setup_commands", "nightly Ray; install"),
    "a worker without a token": Mistake(
        AWS,
        {"worker_start_ray_commands": lambda lines: [line.replace("RAY_AUTH_MODE=token", "A=b") for line in lines]},
        "worker_start_ray_commands[1]",
        "without a token.*export RAY_AUTH_MODE=token",
    ),
    "a misspelled option of ray start": Mistake(
        AWS,
        {
            "head_start_ray_commands": lambda lines: [
                line.replace("--autoscaling-config", "--autoscale") for line in lines
            ]
        },
        "head_start_ray_commands[1]",
        "ray start: No such option.*--autoscale",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_it_is_told(mistake: Mistake) -> None:
    problems = [str(problem) for problem in check_document(changed(read(mistake.file), mistake.changes))]
    told = re.compile(f"{re.escape(mistake.place)}: .*{mistake.told}" if mistake.place else f".*{mistake.told}")
    matching = [text for text in problems if told.match(text)]
    assert len(matching) == 1, problems
    assert len(problems) <= 3, problems
    assert "\n" not in matching[0]


def test_there_are_many() -> None:
    assert len(MISTAKES) >= 30
