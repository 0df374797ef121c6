"""`python -m cluster.check FILE … [--crds FOLDER]`: prints what is wrong in each file; exit code 1 if anything is."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.check.entrypoints import job_problems
from cluster.check.groups import demand_problems, shared_path_problems
from cluster.check.kuberay import clusters_of, groups_of, jobs_of, operator_problems
from cluster.check.launcher import launcher_problems
from cluster.check.pods import pod_problems, pods_in, stop_command
from cluster.check.problem import Problem, mapping
from cluster.check.ray_commands import ray_start_problems
from cluster.check.rayjob import rayjob_problems
from cluster.check.runtime_env import runtime_env_problems
from cluster.check.schema import KINDS, schema_of, schema_problems
from cluster.check.shell import shell_problems
from cluster.check.skypilot import skypilot_problems
from cluster.check.slurm import slurm_problems
from cluster.check.versions import version_problems
from ray_diffsynth.errors import ConfigError, did_you_mean


def check_file(path: Path, crds: Path | None = None) -> list[Problem]:
    """What is wrong in a YAML file of KubeRay's resources, of Ray's launcher or of SkyPilot, or in a script for Slurm.

    Raises ConfigError for a folder `crds` that has not what the file needs.
    """
    try:
        if path.suffix == ".sbatch":
            return list(slurm_problems(path.read_text(encoding="utf-8")))
        documents = [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [Problem((), f"cannot be read: {error}")]
    return [problem for document in documents for problem in check_document(document, crds)] or (
        [] if documents else [Problem((), "is empty")]
    )


def check_document(document: Any, crds: Path | None = None) -> list[Problem]:
    """What is wrong in one document. Raises ConfigError as `check_file` does."""
    if not isinstance(document, Mapping):
        return [Problem((), "is no mapping")]
    if "cluster_name" in document:
        return [*launcher_problems(document), *version_problems(document)]
    if document.get("kind") in KINDS:
        return list(_kuberay(document, crds))
    if "kind" not in document and ("run" in document or set(document) == {"name"}):
        return list(skypilot_problems(document))
    kind = str(document.get("kind"))
    return [Problem(("kind",), f"{kind} is not known; {did_you_mean(kind, KINDS)}")]


def _kuberay(document: Mapping[str, Any], crds: Path | None) -> Iterator[Problem]:
    found = list(schema_problems(document, schema_of(str(document["kind"]), crds)))
    if not any(problem.shape for problem in found):
        for rules in (operator_problems, rayjob_problems, pod_problems, version_problems, _commands):
            found += rules(document)
    yield from found
    for place, job in () if found else jobs_of(document):  # what follows builds on all of that
        command, where = str(job["entrypoint"]), (*place, "entrypoint")
        if "rayClusterSpec" in job:
            yield from demand_problems(command, where, mapping(job["rayClusterSpec"]))
            yield from shared_path_problems(command, where, mapping(job["rayClusterSpec"]))


def _commands(document: Mapping[str, Any]) -> Iterator[Problem]:
    """What those say who read them: the shells and the job of the entrypoint, and Ray of its start and of hooks."""
    for place, job in jobs_of(document):
        command, where = str(job.get("entrypoint", "")), (*place, "entrypoint")
        yield from list(shell_problems(command, where)) or job_problems(command, where)
        if "runtimeEnvYAML" in job:
            yield from runtime_env_problems(str(job["runtimeEnvYAML"]), (*place, "runtimeEnvYAML"))
    for place, cluster in clusters_of(document):
        for where, group in groups_of(cluster, place):
            words = [f"--{name}={value}" for name, value in mapping(group.get("rayStartParams")).items()]
            yield from ray_start_problems(f"ray start {shlex.join(words)}", (*where, "rayStartParams"))
    for place, pod in pods_in(document):
        for at, container in enumerate(map(mapping, pod["containers"])):
            where = (*place, "containers", at, "lifecycle", "preStop", "exec", "command")
            for text in stop_command(container):
                yield from ray_start_problems(text, where)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the files; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.check", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--crds", type=Path, metavar="FOLDER", help="custom resource definitions of your cluster")
    options = parser.parse_args(argv)
    logging.getLogger("ray.autoscaler.v2.scheduler").setLevel(logging.WARNING)  # it tells what it would start
    wrong = 0
    for path in options.files:
        try:
            problems = check_file(path, options.crds)
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
        wrong += len(problems)
        for problem in problems:
            print(f"{path}: {problem}")
        if not problems:
            print(f"{path}: nothing found")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
