"""The script for Slurm, run as it stands by a stand-in for Slurm: two 'nodes' on this machine, a Ray on each."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.check.__main__ import check_file
from cluster.check.slurm import slurm_problems
from ray_diffsynth.training.checkpoint import newest_checkpoint
from ray_diffsynth.training.report.metrics_log import read_metrics
from tests.cluster_files.commands import ray_options, shell_problems
from tests.cluster_files.conftest import Checkout

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "slurm" / "job.sbatch"
NODES = ("localhost", "second")

# As srun: the step has a process group of its own, gets its SIGTERM, and nothing of it is left afterwards.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
words = sys.argv[1:]
options = []
while words[0].startswith("--"):
    options.append(words.pop(0))
(node,) = [option.partition("=")[2] for option in options if option.startswith("--nodelist=")]
assert {{"--overlap", "--nodes=1", "--ntasks=1"}} < set(options) and os.environ["SRUN_CPUS_PER_TASK"] == "2", options
with open(os.environ["STAND_IN_LOG"], "a") as log:
    print("srun", node, *words, file=log)
step = subprocess.Popen(words, env={{**os.environ, "SLURMD_NODENAME": node}}, start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: os.killpg(step.pid, signal.SIGTERM))
code = step.wait()
for what in (signal.SIGTERM, signal.SIGKILL):
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.getsid(int(name)) == step.pid:
                os.kill(int(name), what)
        except ProcessLookupError:
            pass
    time.sleep(1)
sys.exit(code)
"""
SCONTROL = """#!{python}
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print(*sys.argv[3].split(","), sep="\\n")
else:
    with open(os.environ["STAND_IN_LOG"], "a") as log:
        print("scontrol", *sys.argv[1:], file=log)
"""


@dataclass(frozen=True)
class Slurm:
    """Stand-ins for Slurm's commands beside a checkout, and the environment that sbatch would give."""

    checkout: Checkout
    environment: dict[str, str]

    @property
    def folder(self) -> Path:
        return self.checkout.folder.parent

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """The script as sbatch would run it, from a copy; its output goes where `output` finds it."""
        shutil.copy(SCRIPT, self.folder / "slurm_script")
        with open(self.folder / "job.log", "wb") as log:
            return subprocess.Popen(
                ["bash", "slurm_script", *words], env=self.environment, cwd=self.folder, stdout=log, stderr=log
            )

    @property
    def output(self) -> str:
        return (self.folder / "job.log").read_text(errors="replace")

    @property
    def calls(self) -> list[str]:
        """What Slurm's commands were called with."""
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def slurm(checkout: Checkout) -> Slurm:
    folder = checkout.folder.parent
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text.format(python=sys.executable))
        (folder / "bin" / name).chmod(0o755)
    environment = {
        **checkout.environment,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "CODE": str(checkout.folder),
        "STAND_IN_LOG": str(folder / "calls"),
        "SLURM_JOB_ID": str(checkout.number),
        "SLURM_JOB_NODELIST": ",".join(NODES),
        "SLURM_CPUS_PER_TASK": "2",
    }
    return Slurm(checkout, environment)


def test_the_script_is_sound_shell_with_options_that_slurm_reads() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert shell_problems(text) == ""
    assert check_file(SCRIPT) == []
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert options["signal"] == "B:USR1@300" and "requeue" in options and options["open-mode"] == "append"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("--partition=gpu", "--partitoin=gpu", "line[10]: --partitoin is no option of sbatch; did you mean partition?"),
        ("B:USR1@300", "USR1@300", "signal: goes to every process"),
        ("#SBATCH --signal=B:USR1@300\n", "", "signal: is missing"),
        ("#SBATCH --cpus-per-task=64\n", "", "cpus-per-task: is missing"),
        ("--ntasks-per-node=1", "--ntasks-per-node=8", "ntasks-per-node: must be 1"),
        ("#SBATCH --requeue", "# SBATCH --requeue", "is not read by Slurm"),
        ("set -euo pipefail\n", "set -euo pipefail\n#SBATCH --mem=0\n", "stands behind the first command"),
    ],
)
def test_a_mistake_in_the_head_is_found(old: str, new: str, problem: str) -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert old in text
    (found,) = slurm_problems(text.replace(old, new))
    assert re.sub(r"line\[\d+\]", "line[10]", problem) in re.sub(r"line\[\d+\]", "line[10]", str(found))


def test_the_script_starts_ray_as_ray_reads_it() -> None:
    text = SCRIPT.read_text(encoding="utf-8").replace("\\\n", " ")
    (common,) = re.findall(r"exec ray start (.*?) \"\$@\"' ray (.*?) \"\$@\"", text)
    starts = re.findall(r"^\s*ray_on \"\$\S+ (--.*)$", text, re.MULTILINE)
    assert len(starts) == 2
    options = [
        ray_options("start", re.sub(r"\$\(\(.*?\)\)|\$\{?\w+(\[0\])?\}?", "1", f"{common[0]} {common[1]} {start}"))
        for start in starts
    ]
    assert [found["head"] for found in options] == [True, False]
    assert all(found["block"] and found["disable_usage_stats"] and found["temp_dir"] for found in options)
    assert options[0]["dashboard_host"] == "127.0.0.1" and options[1]["address"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_stages_on_two_nodes_and_a_job_that_is_queued_again(slurm: Slurm, tiny_qwen: Path) -> None:
    lora = slurm.folder / "lora"
    # A worker takes the CPUs of a whole node, so that two need both.
    job = [
        "pipeline", "--model", str(tiny_qwen), "--dtype", "float32", "--dataset_base_path", str(slurm.checkout.images),
        "--cache_path", str(slurm.folder / "cache"), "--output_path", str(lora), "--train.num_workers", "2",
        "--train.resources", json.dumps({"CPU": 2}), "--lora_rank", "4", "--lora_target_modules", "to_q",
        "--max_steps", "200", "--save_steps", "200", "--log_with", "none",
    ]  # fmt: skip
    first = slurm.start(*job)
    while not read_metrics(str(lora)):
        assert first.poll() is None, slurm.output
        time.sleep(0.1)
    first.send_signal(signal.SIGUSR1)  # as Slurm does 300 s before the time limit
    assert first.wait() == 143, slurm.output
    assert "cache of 4 samples" in slurm.output
    saved = newest_checkpoint(str(lora))
    assert saved is not None and 0 < saved.step < 200
    assert {call.split()[1] for call in slurm.calls[:2]} == set(NODES)
    assert slurm.calls[2:] == [f"scontrol requeue {slurm.checkout.number}"]
    assert not slurm.checkout.left

    again = slurm.start(*job)
    assert again.wait() == 0, slurm.output
    assert f"going on from step {saved.step} of 200" in slurm.output
    assert [line["step"] for line in read_metrics(str(lora))] == list(range(1, 201))
    assert sum("requeue" in call for call in slurm.calls) == 1 and not slurm.checkout.left


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_whose_ray_does_not_start_ends_the_job_with_the_reason(slurm: Slurm) -> None:
    slurm.environment["SLURM_CPUS_PER_TASK"] = "many"
    (slurm.folder / "bin" / "srun").write_text('#!/bin/bash\nshift 4\nexec "$@"\n')
    job = slurm.start("train", "--help")
    assert job.wait() == 1
    assert "'many' is not a valid integer" in slurm.output and "did not start its Ray" in slurm.output
    assert not slurm.checkout.left
