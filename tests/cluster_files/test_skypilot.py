"""SkyPilot's files: fields of the tasks, options of the jobs, and the script of its nodes, on two 'nodes' here.

SkyPilot itself needs other versions of this project's libraries. Its 0.14.1 was asked once, in an environment apart:
`sky.Task.from_yaml_config` took both tasks and refused fields that are misspelled.
In the check a table of its fields stands for it.
"""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.check.__main__ import check_file
from cluster.check.skypilot import skypilot_problems
from tests.cluster_files.commands import ray_options, shell_problems
from tests.cluster_files.conftest import Checkout

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster" / "skypilot"
DOCUMENTS = list(yaml.safe_load_all((FOLDER / "pipeline.yaml").read_text(encoding="utf-8")))


def test_the_tasks_have_fields_that_skypilot_knows() -> None:
    name, *tasks = DOCUMENTS
    assert name == {"name": "diffsynth"}
    assert [task["name"] for task in tasks] == ["preprocess", "train"]
    assert check_file(FOLDER / "pipeline.yaml") == []
    for task in tasks:
        assert task["secrets"] == {"RAY_AUTH_TOKEN": None}, "given on the command line, not here"
        assert shell_problems(task["setup"] + task["run"], "--exclude=SC1090,SC1091") == ""
    assert [task["resources"]["use_spot"] for task in tasks] == [True, False]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_node": 2}, "num_node: no such field; did you mean num_nodes?"),
        ({"resources": {"use_spots": True, "accelerators": "L4:1"}}, "resources.use_spots: no such field"),
        ({"resources": {"accelerators": "L4"}}, "resources.accelerators: is 'L4'; write NAME:NUMBER"),
        ({"env": {}}, "env: no such field; did you mean envs?"),
        ({"num_nodes": "4"}, "num_nodes: is '4'; write a int"),
        ({"envs": {"MODEL": "m", "DATA": "d"}}, "run: $CACHE is set by nothing"),
        ({"secrets": {"RAY_AUTH_TOKEN": "abc"}}, "secrets.RAY_AUTH_TOKEN: stands here in the clear"),
        ({"run": "bash cluster/skypilot/run.sh preproces --model m"}, "run: there is no job 'preproces'"),
        ({"run": "bash cluster/skypilot/run.sh train --modle m"}, "modle"),
        ({"run": "ray start --head"}, "run: runs no job"),
    ],
)
def test_a_mistake_is_found(change: dict[str, Any], problem: str) -> None:
    (found,) = skypilot_problems({**DOCUMENTS[1], **change})
    assert problem in str(found)


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
    while checkout.left:  # Ray's workers end by themselves when its daemon has, as long as the test may last
        time.sleep(0.1)
