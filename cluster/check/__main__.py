"""`python -m cluster.check FILE … [--crds FOLDER]`: prints what is wrong in each file; exit code 1 if anything is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.check.entrypoints import job_problems
from cluster.check.kuberay import clusters_of, groups_of, jobs_of, operator_problems
from cluster.check.launcher import launcher_problems
from cluster.check.pods import pod_problems
from cluster.check.problem import Problem
from cluster.check.schema import KINDS, schema_of, schema_problems
from cluster.check.versions import version_problems


def check_file(path: Path, crds: Path | None = None) -> list[Problem]:
    """What is wrong in a YAML file of KubeRay's resources or of Ray's launcher."""
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [Problem((), f"cannot be read: {error}")]
    return [problem for document in documents for problem in check_document(document, crds)] or (
        [] if documents else [Problem((), "is empty")]
    )


def check_document(document: Any, crds: Path | None = None) -> list[Problem]:
    """What is wrong in one document."""
    if not isinstance(document, Mapping):
        return [Problem((), "is no mapping")]
    if "cluster_name" in document:
        return [*launcher_problems(document), *version_problems(document)]
    if document.get("kind") in KINDS:
        return list(_kuberay(document, crds))
    return [Problem(("kind",), f"{document.get('kind')!r} is not known; KubeRay's are {', '.join(KINDS)}")]


def _kuberay(document: Mapping[str, Any], crds: Path | None) -> Iterator[Problem]:
    found = list(schema_problems(document, schema_of(str(document["kind"]), crds)))
    yield from found
    if any(len(problem.place) < 3 for problem in found):
        return  # the rules below would stumble over what is not there
    yield from operator_problems(document)
    yield from pod_problems(document)
    yield from version_problems(document)
    groups = [
        {str(key): str(value) for key, value in (group.get("labels") or {}).items()}
        for place, cluster in clusters_of(document)
        for _, group in groups_of(cluster, place)
    ]
    for place, job in jobs_of(document):
        yield from job_problems(str(job.get("entrypoint", "")), (*place, "entrypoint"), groups or None)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the files; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.check", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--crds", type=Path, metavar="FOLDER", help="custom resource definitions of your cluster")
    options = parser.parse_args(argv)
    wrong = 0
    for path in options.files:
        problems = check_file(path, options.crds)
        wrong += len(problems)
        for problem in problems:
            print(f"{path}: {problem}")
        if not problems:
            print(f"{path}: nothing found")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
