"""The manifests of cluster/kuberay: right, alike, careful, and used as their heads say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.check.__main__ import check_file
from cluster.check.entrypoints import KNOWN, job_words
from cluster.check.pods import pods_in
from cluster.check.problem import walk
from tests.cluster_files.manifests import FILES, FOLDER, ROOT, cluster_of, job_of, read

FIXED = ("kueue.yaml", "volcano.yaml")
"""Those in which the number of pods does not change."""


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_wrong_in_it(name: str) -> None:
    assert check_file(FOLDER / name) == []


def test_each_kind_of_use_has_a_file() -> None:
    assert {"raycluster.yaml", "preprocess.yaml", "train.yaml", "pipeline.yaml", "nightly.yaml", *FIXED} == set(FILES)
    assert {name: read(name)["kind"] for name in FILES if read(name)["kind"] != "RayJob"} == {
        "raycluster.yaml": "RayCluster",
        "nightly.yaml": "RayCronJob",
    }


@pytest.mark.parametrize("name", FILES)
def test_its_head_says_how_it_is_used(name: str) -> None:
    """Four values, each marked where it stands, once; commands that name this file; the version of KubeRay."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    head, _, body = text.partition("apiVersion: ")
    assert all(line.startswith("#") for line in head.splitlines())
    for number in "1234":
        assert f"({number})" in head and f"# ({number})" in body
    commands = re.findall(r"^#   (.+)$", head, re.MULTILINE)
    path = f"cluster/kuberay/{name}"
    assert f"make cluster-check FILE={path}" in commands and f"kubectl apply --server-side -f {path}" in commands
    resource = read(name)["metadata"]["name"]
    for command in commands:
        for named in re.findall(r"(?:job/|service/|get secret )([\w-]+)", command):
            assert named in (resource, f"{resource}-head-svc"), command
    assert "KubeRay 1.7" in head
    assert "backoffLimit" in head or name not in ("preprocess.yaml", "train.yaml", "pipeline.yaml")
    assert len(re.findall(r"registry\.example\.com", body)) <= 2, "an image is written once for each of its tags"
    assert body.count("claimName") == 1


def _group(name: str, group: str) -> dict[str, Any]:
    found: dict[str, Any] = next(g for g in cluster_of(read(name))["workerGroupSpecs"] if g["groupName"] == group)
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_same_group_is_the_same_in_all_files(name: str) -> None:
    differs = {"replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds"} if name in FIXED else set()
    for group in cluster_of(read(name))["workerGroupSpecs"]:
        other = _group("raycluster.yaml", group["groupName"])
        assert {k: v for k, v in group.items() if k not in differs} == {
            k: v for k, v in other.items() if k not in differs
        }
    assert cluster_of(read(name))["headGroupSpec"] == cluster_of(read("raycluster.yaml"))["headGroupSpec"]


def test_spot_machines_encode_and_others_train() -> None:
    assert "true" in [v for k, v in _pod("encode")["nodeSelector"].items() if "spot" in k]
    assert not [key for key in _pod("train")["nodeSelector"] if "spot" in key]
    head = cluster_of(read("raycluster.yaml"))["headGroupSpec"]
    assert "gpu" not in json.dumps(head["template"]) and head["rayStartParams"]["num-cpus"] == "0"


def _pod(group: str) -> dict[str, Any]:
    found: dict[str, Any] = _group("raycluster.yaml", group)["template"]["spec"]
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_pod_fits_the_restricted_standard_of_kubernetes(name: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, for what these pods use."""
    document = read(name)
    pods = dict(pods_in(document))
    assert len(pods) >= 2
    for pod in pods.values():
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in pod.get("volumes", ()):
            assert volume.keys() - {"name"} <= {"emptyDir", "persistentVolumeClaim", "secret", "configMap"}
        assert not pod.get("hostNetwork")
    boxes = [box for pod in pods.values() for box in pod["containers"]]
    if options := cluster_of(document).get("autoscalerOptions"):
        boxes.append(options)
    for box in boxes:
        assert box["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("name", FILES)
def test_secrets_come_from_a_secret(name: str) -> None:
    document = read(name)
    for _, value in walk(document):
        if isinstance(value, dict) and re.search("TOKEN|SECRET|KEY$", str(value.get("name", ""))):
            assert (
                "value" not in value and value["valueFrom"]["secretKeyRef"]["name"] != document["metadata"]["name"]
            ), "KubeRay's own secret, the token, has the name of the cluster"
    assert cluster_of(document)["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("group", ["encode", "train"])
def test_a_pod_that_is_deleted_tells_ray_within_its_grace(group: str) -> None:
    pod = _pod(group)
    script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    seconds = {int(number) for number in re.findall(r"(?:seconds|-lt) (\d+)", script)}
    assert len(seconds) == 1 and max(seconds) < pod["terminationGracePeriodSeconds"]
    subprocess.run(["bash", "-n", "-c", script], check=True)


RAY = f"""#!{sys.executable}
import shlex, subprocess, sys
words = sys.argv[1:]
if words[:2] == ["job", "status"]:
    sys.exit(1)
if words[:2] == ["job", "submit"]:
    subprocess.run(shlex.join(words[words.index("--") + 1 :]), shell=True, check=True)
"""
JOB = f"""#!{sys.executable}
import json, sys
print(json.dumps(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", [name for name in FILES if job_of(read(name)) is not None])
def test_its_words_reach_the_job_through_both_shells(name: str, tmp_path: Path) -> None:
    """The submitter's script as KubeRay 1.7 makes it, with a `ray` that quotes as `ray job submit` does."""
    job = job_of(read(name))
    assert job is not None
    for program, text in (("ray", RAY), ("ray-diffsynth", JOB)):
        (tmp_path / program).write_text(text, encoding="utf-8")
        (tmp_path / program).chmod(0o755)
    entrypoint = job["entrypoint"].strip()
    script = (
        "if ! ray job status --address http://head:8265 id >/dev/null 2>&1 ; then "
        f"ray job submit --address http://head:8265 --no-wait --submission-id id -- {entrypoint} ; fi ; "
        "ray job logs --address http://head:8265 --follow id"
    )
    done = subprocess.run(
        ["/bin/bash", "-ce", "--", script],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = job_words(entrypoint)
    assert found is not None and json.loads(done.stdout) == [found[0], *found[1]]
    assert found[0] in KNOWN


def test_make_checks_a_file_of_the_user() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^cluster-check: .*## ", makefile, re.MULTILINE)
    assert "python -m cluster.check $(FILE)" in makefile


@pytest.mark.parametrize(("code", "waits"), [(0, True), (1, False)])
def test_a_pod_waits_for_its_ray_only_where_ray_has_heard_of_its_end(code: int, waits: bool, tmp_path: Path) -> None:
    """The hook itself, with a `ray` that answers so, and a folder in place of /proc with one process named raylet."""
    command = _pod("encode")["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    process = tmp_path / "proc" / "7" / "comm"
    process.parent.mkdir(parents=True)
    process.write_text("raylet\n")
    (tmp_path / "ray").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/words\nexit {code}\n')
    (tmp_path / "ray").chmod(0o755)
    script = command[-1].replace("/proc/", f"{tmp_path}/proc/")
    hook = subprocess.Popen([*command[:-1], script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    if waits:
        with pytest.raises(subprocess.TimeoutExpired):
            hook.wait(1.5)
        process.unlink()
    assert hook.wait(60) in (0, 1) and process.exists() is not waits
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"] and "its pod is deleted" in words
