"""Documents against a strict schema: a key that it does not name is a mistake, with the nearest name as the fix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError

from cluster.check.problem import Problem
from ray_diffsynth.errors import ConfigError, did_you_mean, nearest

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # definitions are megabytes, a minute in Python alone
KINDS = ("RayCluster", "RayJob", "RayCronJob")
_TYPES = {
    "string": "a text; put it in quotes",
    "integer": "a whole number, without quotes",
    "number": "a number, without quotes",
    "boolean": "true or false, without quotes",
    "array": "a list; begin each entry with a dash",
    "object": "a mapping of names to values",
}


@cache
def own_schema() -> dict[str, Any]:
    """The fields of KubeRay and of Kubernetes that the files here use: `schema.yaml`, with `$ref`s to its `$defs`."""
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "schema.yaml").read_text(encoding="utf-8"))
    return found


def schema_of(kind: str, crds: Path | None = None) -> dict[str, Any]:
    """The schema of a kind: that of a cluster's own CRDs where their folder is given, else our own.

    Raises ConfigError for a folder that has no CRD of the kind.
    """
    own = own_schema()
    if crds is None:
        return {"$ref": f"#/$defs/{kind}", **own}
    found = strict(_from_crds(kind, crds))
    # CRDs leave the metadata of a resource to the API server.
    return {**found, "properties": {**found["properties"], "metadata": own["$defs"]["metadata"]}, **own}


@cache
def _from_crds(kind: str, folder: Path) -> dict[str, Any]:
    """The openAPIV3Schema of the newest served version of `kind` in a folder of CRDs (YAML or JSON)."""
    for path in sorted(path for path in folder.glob("*") if path.suffix in (".yaml", ".yml", ".json")):
        for document in yaml.load_all(path.read_text(encoding="utf-8"), Loader=_LOADER):
            for crd in document["items"] if (document or {}).get("kind") == "List" else [document or {}]:
                spec = crd.get("spec", {})
                versions = [version for version in spec.get("versions", ()) if version.get("served")]
                if crd.get("kind") == "CustomResourceDefinition" and spec["names"]["kind"] == kind and versions:
                    schema: dict[str, Any] = versions[-1]["schema"]["openAPIV3Schema"]
                    return schema
    name = f"{kind.lower()}s.ray.io"
    raise ConfigError(f"{folder} has no CRD of {kind}; kubectl get crd {name} -o yaml > {folder / name}.yaml")


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A structural schema in which unknown keys are refused: the API server may drop them without a word."""
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
    for error in sorted(Draft202012Validator(schema).iter_errors(document), key=lambda error: str(error.path)):
        place = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            known = list(error.schema.get("properties", ()))
            for key in error.instance:
                if key not in known:
                    yield Problem((*place, key), _unknown(str(key), known))
        elif error.validator == "required":
            for key in error.validator_value:
                if key not in error.instance:
                    yield Problem((*place, key), "is missing")
        else:
            yield Problem(place, _readable(error), shape=error.validator == "type")


def _unknown(key: str, known: list[str]) -> str:
    if nearest(key, known):
        return f"there is no such field here; {did_you_mean(key, known)}"
    return (
        f"there is no such field among those that this check knows here ({', '.join(sorted(known))}); "
        "if your cluster has it, name a folder of its CRDs (--crds)"
    )


def _readable(error: ValidationError) -> str:
    value, rule = error.instance, error.validator_value
    if error.validator == "type":
        return f"{value!r} is not {_TYPES.get(rule, rule)}"
    if error.validator == "enum":
        return f"{value!r} is not one of its values; {did_you_mean(str(value), map(str, rule))}"
    if error.validator == "const":
        return f"{value!r} must be {rule}"
    if error.validator == "minimum":
        return f"{value!r} must be at least {rule}"
    return str(error.schema.get("description") or error.message).replace("{value}", repr(value))
