"""The command `python -m cluster.check`, and its parts by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.check.__main__ import check_document, check_file, main
from cluster.check.entrypoints import job_words
from cluster.check.pods import amount
from cluster.check.problem import Problem
from cluster.check.shell import acted_on
from ray_diffsynth.errors import ConfigError
from tests.cluster_files.manifests import FOLDER, read


def test_it_prints_each_problem_with_its_file_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = read("raycluster.yaml")
    document["metadata"]["name"] = "a_b"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(document), encoding="utf-8")
    right = str(FOLDER / "raycluster.yaml")
    assert main([right, str(wrong)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{right}: nothing found" and len(told) == 2
    assert told[1].startswith(f"{wrong}: metadata.name: 'a_b' is no name of a resource")
    assert main([right]) == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("a: [", "cannot be read: "),
        ("- 1", "is no mapping"),
        ("kind: Deployment", "kind: Deployment is not known; choose from RayCluster, RayCronJob, RayJob"),
    ],
)
def test_what_is_no_manifest(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    (problem,) = check_file(path)
    assert str(problem).startswith(told)
    (problem,) = check_file(tmp_path / "none.yaml")
    assert str(problem).startswith("cannot be read: ")


def test_each_document_of_a_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"{yaml.safe_dump(read('raycluster.yaml'))}---\nkind: Job\n---\n", encoding="utf-8")
    assert [problem.place for problem in check_file(path)] == [("kind",)]


def crd(kind: str, spec: dict[str, Any], **versions: bool) -> dict[str, Any]:
    """A definition of a resource, with a version for each name: whether it is served."""
    schema = {
        "type": "object",
        "properties": {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}, "spec": spec},
    }
    return {
        "kind": "CustomResourceDefinition",
        "spec": {
            "names": {"kind": kind},
            "versions": [
                {"name": name, "served": served, "schema": {"openAPIV3Schema": schema if served else {}}}
                for name, served in versions.items()
            ],
        },
    }


def test_the_fields_of_the_users_own_cluster(tmp_path: Path) -> None:
    """A field that only that cluster has is known, one that it does not have is not, and the metadata stay checked."""
    head = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    amounts = {"type": "object", "additionalProperties": {"x-kubernetes-int-or-string": True}}
    fields = {"rayVersion": {"type": "string"}, "novelty": {"type": "boolean"}, "headGroupSpec": head, "sizes": amounts}
    found = crd("RayCluster", {"type": "object", "properties": fields}, v1alpha1=False, v1=True)
    (tmp_path / "crds.yaml").write_text(yaml.safe_dump({"kind": "List", "items": [found]}), encoding="utf-8")
    document: dict[str, Any] = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "a", "label": {}}}
    document["spec"] = {
        "rayVersion": "2.60.0",
        "novelty": 1,
        "autoscalerOptions": {},
        "sizes": {"a": 1, "b": "1", "c": []},
    }
    told = {problem.place: problem.message for problem in check_document(document, tmp_path)}
    assert told[("metadata", "label")] == "there is no such field here; did you mean labels?"
    assert told[("spec", "novelty")] == "1 is not true or false, without quotes"
    assert "--crds" in told[("spec", "autoscalerOptions")]
    assert ("spec", "sizes", "c") in told and ("spec", "sizes", "b") not in told
    with pytest.raises(ConfigError, match=r"has no CRD of RayJob; kubectl get crd rayjobs\.ray\.io -o yaml > "):
        check_document(read("preprocess.yaml"), tmp_path)


def test_a_folder_without_definitions_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text(json.dumps(crd("RayService", {"type": "object"}, v1=True)), encoding="utf-8")
    assert main([str(FOLDER / "raycluster.yaml"), "--crds", str(tmp_path)]) == 2
    assert "has no CRD of RayCluster" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "characters"),
    [
        ("a --b 'c; d $E' \"f; g\" h\\;i", ""),
        ('a "$B" `c`', "$``"),
        ("a && b | c > d", "&&|>"),
        ("a#b #c", "#"),
        ("a\nb (c)", "\n()"),
        ("a '`$'\"'\"'$'", ""),
    ],
)
def test_what_a_shell_acts_on(command: str, characters: str) -> None:
    assert "".join(character for _, character in acted_on(command)) == characters


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("python jobs/train.py --a 1", ("train", ["--a", "1"])),
        ("cd /x && /x/bin/python /x/jobs/preprocess.py --a \\\n --b=2 && echo done", ("preprocess", ["--a", "--b=2"])),
        ("sh -c 'ray-diffsynth train --a 1; echo done'", ("train", ["--a", "1"])),
        ("/venv/bin/ray-diffsynth generate", ("generate", [])),
        ("python main.py", None),
    ],
)
def test_the_job_of_a_command(command: str, found: tuple[str, list[str]] | None) -> None:
    assert job_words(command) == found


@pytest.mark.parametrize(
    ("text", "number"),
    [("500m", 0.5), ("4", 4), (2, 2), ("1.5G", 1.5e9), ("1Ki", 1024), ("16Gi", 2**34), ("1Ti", 2**40)],
)
def test_quantities(text: str | int, number: float) -> None:
    assert amount(text) == number


@pytest.mark.parametrize("text", ["16GB", "", "1 Gi", "1.5.0Gi"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="16Gi"):
        amount(text)


def test_a_place_reads_as_in_a_path() -> None:
    assert str(Problem(("a", 0, "b.c/d"), "is wrong")) == "a[0].b.c/d: is wrong" and str(Problem((), "all")) == "all"
