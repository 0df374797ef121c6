"""docs/operations.md and cluster/README.md are true: programs read their commands, messages and metrics exist."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.check.entrypoints import job_problems
from ray_diffsynth.cli import COMMANDS
from ray_diffsynth.report import training_numbers, write_json
from ray_diffsynth.version import __version__
from tests.cluster_files.commands import ray_options
from tests.docs.test_docs import Block, _text, blocks, commands

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "docs" / "operations.md", ROOT / "cluster" / "README.md")
KUBERAY = ROOT / "cluster" / "kuberay"
DASHBOARD = ROOT / "cluster" / "grafana" / "ray_diffsynth.json"
OPERATIONS = PAGES[0].read_text(encoding="utf-8")


def shell_lines(page: Path) -> list[tuple[str, str]]:
    return [(block.place, line) for block in blocks(page) if block.language == "sh" for line in commands(block.code)]


def parse_ray(words: list[str]) -> None:
    """Ray's own parser; files that are named exist, and what is submitted is read by the job's parser."""
    before, submitted = words, []
    if "--" in words:
        before, submitted = words[: words.index("--")], words[words.index("--") + 1 :]
    depth = 2 if before[0] in ("job", "list") else 1
    ray_options(" ".join(before[:depth]), shlex.join([*before[depth:], *(["--", *submitted] if submitted else [])]))
    assert all((ROOT / word).exists() for word in before if word.endswith(".yaml"))
    assert not submitted or list(job_problems(shlex.join(submitted), ())) == []


def parse_make(words: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
    assert all((ROOT / word.partition("=")[2]).exists() for word in words if word.startswith("FILE="))


def parse_export(words: list[str]) -> None:
    assert words == ["RAY_AUTH_MODE=token"]


def parse_sbatch(words: list[str]) -> None:
    """Options, the script, and the job's own options."""
    script = next(word for word in words if not word.startswith("-"))
    at = words.index(script)
    assert (ROOT / script).exists()
    assert all(re.fullmatch(r"--(partition|nodes|dependency)=\S+", word) for word in words[:at])
    job, *options = words[at + 1 :]
    assert list(job_problems(shlex.join(["python", f"jobs/{job}.py", *options]), ())) == []


def parse_sky(words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("command", nargs=2)
    parser.add_argument("--secret")
    parser.add_argument("file", type=Path)
    found = parser.parse_args(words)
    assert found.command == ["jobs", "launch"] and (ROOT / found.file).exists()


def parse_kubectl(words: list[str]) -> None:
    """Verbs and options that the pages use; files exist, and a job that is named is one of our files."""
    verb, *rest = words
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("what", nargs="?")
    if verb in ("apply", "delete"):
        parser.add_argument("-f", type=Path, required=True)
    if verb == "apply":
        parser.add_argument("--server-side", action="store_true", required=True)  # the definitions are too large else
    if verb == "logs":
        parser.add_argument("-f", action="store_true")
    found = parser.parse_args(rest)
    assert verb in ("apply", "delete", "logs")
    if verb == "logs":
        documents = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in KUBERAY.glob("*.yaml")]
        jobs = {f"job/{document['metadata']['name']}" for document in documents if document["kind"] == "RayJob"}
        assert found.what in jobs
    else:
        assert (ROOT / found.f).exists() and found.what is None


def parse_docker(words: list[str]) -> None:
    """A build of a target of our Dockerfile from the checkout; the tag is of this version."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("command", choices=["build"])
    parser.add_argument("-f", type=Path)
    parser.add_argument("--target")
    parser.add_argument("-t")
    parser.add_argument("folder", choices=["."])
    found = parser.parse_args(words)
    assert f" AS {found.target}\n" in (ROOT / found.f).read_text(encoding="utf-8")
    assert found.t.endswith(f":{__version__}-{found.target}")


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "ray": parse_ray,
    "make": parse_make,
    "export": parse_export,
    "sbatch": parse_sbatch,
    "sky": parse_sky,
    "kubectl": parse_kubectl,
    "docker": parse_docker,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_is_one_that_its_program_reads(page: Path) -> None:
    lines = shell_lines(page)
    assert len(lines) >= 4
    for place, line in lines:
        program, *words = shlex.split(line)
        assert program in PROGRAMS, f"{place}: nothing parses {line}"
        try:
            PROGRAMS[program](words)
        except Exception as error:
            raise AssertionError(f"{place}: {line}") from error


@pytest.mark.parametrize(
    "line",
    [
        "ray job submit --adress x -- python jobs/train.py",
        "ray job submit --address x -- python jobs/train.py --modle m",
        "ray up cluster/launcher/azure.yaml",
        "ray drain-nodes",
        "make cluster-chekc",
        "sbatch --partitoin=a cluster/slurm/job.sbatch train",
        "kubectl apply -f cluster/kuberay/train.yaml",
        "kubectl logs -f job/diffsynth",
        "docker build -f cluster/docker/Dockerfile --target gpus -t a:0.1.0-gpus .",
    ],
)
def test_a_command_with_a_mistake_is_found(line: str) -> None:
    program, *words = shlex.split(line)
    with pytest.raises((Exception, SystemExit)):  # argparse, click and make end in ways of their own
        PROGRAMS[program](words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_exist(page: Path) -> None:
    """With their options; what they need beside them may be left out there."""
    from ray.scripts.scripts import cli

    sentences = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`((?:ray|ray-diffsynth|make) [^`]+)`", sentences)
    assert len(found) >= 5
    for program, *words in map(shlex.split, found):
        if program == "ray":
            command: Any = cli
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            assert command is not cli, words
            options = {name for parameter in command.params for name in parameter.opts}
            assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options, (command.name, words)
        elif program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        else:
            assert words[0] in COMMANDS


def test_the_sizes_follow_from_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = [
        {"name": "vae", "encoded": 900, "reused": 100, "rows_per_second": 10.0, "bytes": 400_000_000},
        {"name": "text_encoder", "encoded": 500, "reused": 0, "rows_per_second": 40.0, "bytes": 100_000_000},
    ]
    metrics = [{"step": step, "loss": 1.0, "samples_per_second": 4.0} for step in (1, 2, 3)]
    monkeypatch.chdir(tmp_path)
    for folder, report in (("cache/pictures", {"groups": groups}), ("models/my_lora", {})):
        (tmp_path / folder).mkdir(parents=True)
        write_json(folder, {**report, "training": training_numbers(metrics)})
    (block,) = (block for block in blocks(PAGES[0]) if block.language == "python")
    exec(compile(block.code, block.place, "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "vae: 27.8 GPU hours, 400.0 GB",
        "text_encoder: 6.9 GPU hours, 200.0 GB",
        "stage 1: 34.7 GPU hours, stage 2: 347.2",
    ]


def test_the_messages_are_in_the_program() -> None:
    headings = re.findall(r"^### `(.*)`$", OPERATIONS, re.MULTILINE)
    said = {
        _text(node)
        for path in (ROOT / "ray_diffsynth").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    }
    for heading in headings:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in heading.split("…") if part.strip()))
        assert any(pattern.search(text) for text in said), heading
    assert len(headings) >= 6


def dashboard_names() -> set[str]:
    """Names of metrics in the expressions of the dashboard."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    text = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    return set(re.findall(r"\b(?:ray|autoscaler)_\w+", text))


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    """As far as its model says: panels with ids and places of their own, a data source that is asked for."""
    found = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert found["title"] and found["uid"] and found["schemaVersion"] >= 36 and "__inputs" not in found
    assert [variable["type"] for variable in found["templating"]["list"]] == ["datasource"]
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 8
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) and all(panel["gridPos"]["w"] + panel["gridPos"]["x"] <= 24 for panel in panels)
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        ids = [target["refId"] for target in panel["targets"]]
        assert ids == sorted(set(ids)) and panel["title"]
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")


def test_rays_own_metrics_are_those_of_rays_own_dashboards() -> None:
    import ray.dashboard.modules.metrics.dashboards as dashboards

    folder = Path(dashboards.__file__).parent
    known = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*_panels.py"))
    known += (folder.parents[2] / "modules" / "reporter" / "reporter_agent.py").read_text(encoding="utf-8")
    for name in dashboard_names():
        if not name.startswith("ray_ray_diffsynth_"):
            assert re.search(rf"\b{name}\b|\"{name.removeprefix('ray_')}\"", known), name


@pytest.mark.ray
@pytest.mark.slow
def test_the_metrics_of_the_page_and_the_dashboard_are_exported(local_ray: None) -> None:
    """Under these names: Ray puts its own name before those of the program, and a suffix behind counters."""
    import ray

    from ray_diffsynth.preprocess.metrics import PoolMetrics
    from ray_diffsynth.preprocess.monitor import Counts

    metrics = PoolMetrics("vae", total=10)
    metrics.update(Counts())
    metrics.update(Counts(3, 1, 500))
    (node,) = ray.nodes()
    wanted = set(re.findall(r"^\| `(ray_\w+)` \|", OPERATIONS, re.MULTILINE))
    assert len(wanted) == 5
    used = {name for name in dashboard_names() if name.startswith("ray_ray_diffsynth_")}
    assert used <= wanted
    exported: set[str] = set()
    while not wanted <= exported:  # Ray reports every few seconds, as long as the test may last
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                exported = set(re.findall(r"^(\w+)\{[^}]*group=\"vae\"", answer.read().decode(), re.MULTILINE))
        except OSError:
            pass
        time.sleep(0.5)


def test_blocks_that_are_no_commands_are_few() -> None:
    """A command in another kind of block would not be parsed."""
    others: list[Block] = [block for page in PAGES for block in blocks(page) if block.language not in ("sh", "python")]
    assert others == []
