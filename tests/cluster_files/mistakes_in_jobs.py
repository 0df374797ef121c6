"""Typical mistakes in KubeRay's RayJob: its command and what it asks for, its schedule, its queue."""

from __future__ import annotations

from tests.cluster_files.mistakes import CRON, ENCODE, GONE, KUEUE, PRE, VOLCANO, J, Mistake, instead

MISTAKES = {
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
}
