"""The public names of pipelines: they are there, and type checkers see the same ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ray_diffsynth import pipelines


def test_each_public_name_is_there_and_known_to_type_checkers() -> None:
    tree = ast.parse(Path(str(pipelines.__file__)).read_text(encoding="utf-8"))
    imports = {
        str(name.asname): str(node.module).removeprefix("ray_diffsynth.pipelines.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ray_diffsynth.pipelines.")
        for name in node.names
    }
    (call,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    assert imports == ast.literal_eval(call.args[1])
    for name in imports:
        assert getattr(pipelines, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        pipelines.Pipelines  # type: ignore[attr-defined]  # noqa: B018
