"""Our words for KubeRay's fields agree with its own definitions, which are not part of this repository.

KUBERAY_CRDS=FOLDER names a folder of them, as `kubectl get crd rayclusters.ray.io … -o yaml` prints them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from cluster.check.__main__ import check_file
from cluster.check.schema import KINDS, own_schema, schema_of
from tests.cluster_files.manifests import FILES, FOLDER

CRDS = Path(os.environ.get("KUBERAY_CRDS", "/nowhere"))
given = pytest.mark.skipif(not CRDS.is_dir(), reason="KUBERAY_CRDS names no folder of KubeRay's definitions")


def resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        schema = own_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def differences(own: Mapping[str, Any], theirs: Mapping[str, Any], place: str) -> Iterator[str]:
    """Fields that they do not have, other types and values, and what they need and ours does not."""
    own = resolved(own)
    if "anyOf" in theirs:  # a number or a text
        if "anyOf" not in own:
            yield f"{place}: may be a number or a text"
        return
    kind = own.get("type", "string" if {"enum", "const"} & own.keys() else None)
    if kind != theirs.get("type"):
        yield f"{place}: is {theirs.get('type')}, not {kind}"
    if "enum" in theirs and set(theirs["enum"]) != set(own.get("enum", ())):
        yield f"{place}: may be {theirs['enum']}"
    known = theirs.get("properties", {})
    for name, inner in own.get("properties", {}).items():
        if name in known:
            yield from differences(inner, known[name], f"{place}.{name}")
        elif known:
            yield f"{place}.{name}: is no field"
    if own.get("properties") and (missing := set(theirs.get("required", ())) - set(own.get("required", ()))):
        yield f"{place}: needs {sorted(missing)}"
    for part in ("items", "additionalProperties"):
        if isinstance(own.get(part), Mapping):
            yield from differences(own[part], theirs.get(part) or {}, f"{place}[]")


def test_it_is_a_schema() -> None:
    for kind in KINDS:
        Draft202012Validator.check_schema(schema_of(kind))


@given
@pytest.mark.parametrize("kind", KINDS)
def test_every_field_that_we_know_is_theirs(kind: str) -> None:
    theirs = schema_of(kind, CRDS)
    theirs = {**theirs, "properties": {**theirs["properties"], "metadata": {"type": "object"}}}
    assert list(differences({"$ref": f"#/$defs/{kind}"}, theirs, kind)) == []


@given
@pytest.mark.parametrize("name", FILES)
def test_our_files_are_right_by_their_definitions(name: str) -> None:
    assert check_file(FOLDER / name, CRDS) == []


THEIRS = {
    "type": "object",
    "required": ["a"],
    "properties": {
        "a": {"type": "string"},
        "b": {"type": "string", "enum": ["x"]},
        "c": {"type": "array", "items": {}},
    },
}


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"type": "object", "required": ["a"], "properties": {"a": {"type": "string"}, "b": {"enum": ["x"]}}}, []),
        ({"type": "object", "required": ["a"], "properties": {"d": {}}}, ["k.d: is no field"]),
        (
            {"type": "object", "properties": {"a": {"type": "integer"}}},
            ["k.a: is string, not integer", "k: needs ['a']"],
        ),
        ({"type": "object", "required": ["a"], "properties": {"b": {"enum": ["x", "y"]}}}, ["k.b: may be ['x']"]),
    ],
)
def test_what_counts_as_a_difference(own: Mapping[str, Any], told: list[str]) -> None:
    assert list(differences(own, THEIRS, "k")) == told
