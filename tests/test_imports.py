"""The contract against circles of imports sees those that only type checkers follow."""

from __future__ import annotations

from pathlib import Path

import grimp
import pytest

from tests.acyclic_contract import find_cycle

TYPE_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from circle.a import A\n"


@pytest.mark.parametrize(
    ("modules", "cycle"),
    [
        ({"a": "from circle import b", "b": "import os"}, set()),
        ({"a": "from circle import b", "b": TYPE_ONLY}, {"circle.a", "circle.b"}),
        ({"a": "from circle import b", "b": "import circle.c", "c": TYPE_ONLY}, {"circle.a", "circle.b", "circle.c"}),
    ],
    ids=["none", "for types", "of three"],
)
def test_a_circle_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: dict[str, str], cycle: set[str]
) -> None:
    package = tmp_path / "circle"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, code in modules.items():
        (package / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    graph = grimp.build_graph("circle", include_external_packages=True, cache_dir=None)
    assert set(find_cycle(graph)) == cycle
