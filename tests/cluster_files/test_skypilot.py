"""SkyPilot's files: fields of the tasks, options of the jobs, and the script of its nodes, on two 'nodes' here.

SkyPilot itself needs other versions of this project's libraries. Its 0.14.1 was asked once, in an environment apart:
`sky.Task.from_yaml_config` takes both tasks and refuses the mistakes below. Here a table of its fields stands for it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_diffsynth.config import JOBS
from ray_diffsynth.config.flags import parse
from tests.cluster_files.commands import ray_options, shell_problems
from tests.cluster_files.conftest import Checkout

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster" / "skypilot"
DOCUMENTS = list(yaml.safe_load_all((FOLDER / "pipeline.yaml").read_text(encoding="utf-8")))
TASK = {"name": str, "workdir": str, "num_nodes": int, "resources": dict, "envs": dict, "secrets": dict}
TASK |= {"setup": str, "run": str}
RESOURCES = {"accelerators": str, "cpus": str, "memory": str, "disk_size": int, "use_spot": bool}
"""The fields of SkyPilot 0.14.1 that the file uses; another one is taken for a mistake."""


def problems(task: dict[str, Any]) -> list[str]:
    """Fields that are not known, or of another type; variables of the commands that nothing sets."""
    found = [
        f"{key}: no such field" if key not in known else f"{key}: {value!r}"
        for known, fields in ((TASK, task), (RESOURCES, task.get("resources", {})))
        for key, value in fields.items()
        if not isinstance(value, known.get(key, ()))
    ]
    if re.fullmatch(r"[A-Z][\w-]*:\d+", str(task.get("resources", {}).get("accelerators"))) is None:
        found.append("accelerators: write NAME:NUMBER")
    used = set(re.findall(r"\$\{?([A-Z]\w+)", task.get("run", "")))
    return found + [f"${name} is not set" for name in used - set(task.get("envs", {}))]


def test_the_tasks_have_fields_that_skypilot_knows() -> None:
    name, *tasks = DOCUMENTS
    assert name == {"name": "diffsynth"}
    assert [task["name"] for task in tasks] == ["preprocess", "train"]
    for task in tasks:
        assert problems(task) == []
        assert task["secrets"] == {"RAY_AUTH_TOKEN": None}, "given on the command line, not here"
        assert shell_problems(task["setup"] + task["run"], "--exclude=SC1090,SC1091") == ""
    assert [task["resources"]["use_spot"] for task in tasks] == [True, False]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_node": 2}, "num_node: no such field"),
        ({"resources": {"use_spots": True, "accelerators": "L4:1"}}, "use_spots: no such field"),
        ({"resources": {"accelerators": "L4"}}, "accelerators: write NAME:NUMBER"),
        ({"env": {}}, "env: no such field"),
        ({"num_nodes": "4"}, "num_nodes: '4'"),
        ({"envs": {"MODEL": "m", "DATA": "d"}}, "$CACHE is not set"),
    ],
)
def test_a_mistake_is_found(change: dict[str, Any], problem: str) -> None:
    assert problems({**DOCUMENTS[1], **change}) == [problem]


def test_the_jobs_read_their_options() -> None:
    for task in DOCUMENTS[1:]:
        (line,) = (line for line in task["run"].splitlines() if "run.sh" in line)
        words = [task["envs"][word[1:]] if word.startswith("$") else word for word in shlex.split(line)]
        assert words[:3] == ["bash", "cluster/skypilot/run.sh", task["name"]]
        config_class = next(config for config in JOBS if config.job == task["name"])
        assert parse(config_class, words[3:], prog=task["name"])


def test_the_script_starts_ray_as_ray_reads_it() -> None:
    text = (FOLDER / "run.sh").read_text(encoding="utf-8")
    assert shell_problems(text) == ""
    text = text.replace("\\\n", " ")
    (common,) = re.findall(r"exec ray start (.*?) \"\$@\"", text)
    starts = re.findall(r"^\s*\(?start (--.*?)(?:\)? \|\| true| &)$", text, re.MULTILINE)
    assert len(starts) == 2
    worker, head = (ray_options("start", re.sub(r"\$\(\(.*?\)\)|\$\w+", "1", f"{common} {start}")) for start in starts)
    assert head["head"] and head["dashboard_host"] == "127.0.0.1" and head["block"]
    assert worker["address"] and not worker["head"] and worker["block"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_on_two_nodes(checkout: Checkout, tiny_qwen: Path) -> None:
    environment = {
        **checkout.environment,
        "PATH": f"{checkout.folder / '.venv' / 'bin'}:{checkout.environment['PATH']}",
        "RAY_AUTH_TOKEN": "secret-of-this-test",
        "RAY_PORT": str(checkout.port),
        "RAY_ADDRESS": "127.0.0.1:6380",  # SkyPilot's own
        "SKYPILOT_NODE_IPS": "localhost\nlocalhost",
        "SKYPILOT_NUM_NODES": "2",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "2",  # a node ends so long after the head; 60 by default
    }
    cache = checkout.folder.parent / "cache"
    job = ["preprocess", "--model", str(tiny_qwen), "--dtype", "float32", "--dataset_base_path", str(checkout.images)]
    command = ["bash", str(FOLDER / "run.sh"), *job, "--output_path", str(cache)]
    logs = [checkout.folder.parent / f"{rank}.log" for rank in range(2)]
    nodes = []
    for rank, log in enumerate(logs):
        with open(log, "wb") as output:
            nodes.append(
                subprocess.Popen(
                    command,
                    env={**environment, "SKYPILOT_NODE_RANK": str(rank)},
                    cwd=checkout.folder,
                    stdout=output,
                    stderr=output,
                )  # fmt: skip
            )
    codes = [node.wait() for node in nodes]
    said = [log.read_text(errors="replace") for log in logs]
    assert codes == [0, 0], "\n".join(said)
    assert "cache of 4 samples" in said[0] and (cache / "manifest.json").exists()
    assert "Ray runtime started" in said[1] and "secret-of-this-test" not in "".join(said)
    assert not checkout.left
