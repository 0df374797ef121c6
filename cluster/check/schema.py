"""Documents against a strict schema: a key that it does not name is a mistake, with the nearest name as the fix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from cluster.check.problem import Problem
from ray_diffsynth.errors import did_you_mean

KINDS = ("RayCluster", "RayJob", "RayCronJob")


@cache
def own_schema() -> dict[str, Any]:
    """The fields of KubeRay and of Kubernetes that the files here use: `schema.yaml`, with `$ref`s to its `$defs`."""
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "schema.yaml").read_text(encoding="utf-8"))
    return found


def schema_of(kind: str, crds: Path | None = None) -> dict[str, Any]:
    """The schema of a kind: that of a cluster's own CRDs where their folder is given, else our own."""
    found = _from_crds(kind, crds) if crds is not None else None
    return {"$ref": f"#/$defs/{kind}", **own_schema()} if found is None else strict(found)


def _from_crds(kind: str, folder: Path) -> dict[str, Any] | None:
    """The openAPIV3Schema of the newest served version of `kind` in a folder of CRDs (YAML or JSON)."""
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml"), *folder.glob("*.json")]):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            spec = (document or {}).get("spec", {})
            if (document or {}).get("kind") != "CustomResourceDefinition" or spec.get("names", {}).get("kind") != kind:
                continue
            versions = [version for version in spec.get("versions", ()) if version.get("served")]
            if versions:
                schema: dict[str, Any] = versions[-1]["schema"]["openAPIV3Schema"]
                return schema
    return None


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A structural schema in which unknown keys are refused: the API server drops them without a word."""
    made: dict[str, Any] = _strict(schema)
    return made


def _strict(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        made: dict[str, Any] = {key: _strict(value) for key, value in schema.items()}
        known = made.get("properties")
        free = "additionalProperties" in made or made.get("x-kubernetes-preserve-unknown-fields")
        if isinstance(known, Mapping) and known and not free:
            made["additionalProperties"] = False
        if made.pop("x-kubernetes-int-or-string", False):
            made.pop("type", None)
            made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        return made
    if isinstance(schema, list):
        return [_strict(value) for value in schema]
    return schema


def schema_problems(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Problem]:
    """What the schema refuses, a Problem each, keys that are not known one by one."""
    for error in sorted(Draft202012Validator(schema).iter_errors(document), key=lambda error: list(error.path)):
        place = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            known = list(error.schema.get("properties", ()))
            for key in error.instance:
                if key not in known:
                    yield Problem((*place, key), f"no such field; {did_you_mean(str(key), known)}")
        else:
            yield Problem(place, error.message)
