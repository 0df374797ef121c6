"""The site of the documentation: `make docs` builds it strictly; here, that it has every page and every public name."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PUBLIC = ("ray_diffsynth", "ray_diffsynth.pipelines", "ray_diffsynth.diffusion", "ray_diffsynth.tasks")
"""Packages whose exported names are the interface for families and programs of one's own."""


def documented() -> list[str]:
    """What the reference names, as its pages do."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)]


def exported(package: str) -> set[str]:
    """The names that a package has for its users, read without importing it."""
    tree = ast.parse(Path(ROOT, *package.split("."), "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname for node in imports for alias in node.names if alias.asname}


def pages_of(nav: Any) -> Iterator[str]:
    for entry in nav if isinstance(nav, list) else nav.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from pages_of(entry)


def test_every_page_is_in_the_navigation() -> None:
    listed = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert len(listed) == len(set(listed))
    assert {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} <= set(listed)


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_in_the_reference(package: str) -> None:
    """By its shortest name: what ray_diffsynth itself has is not told again as a name of a package in it."""
    names = exported(package) if package == "ray_diffsynth" else exported(package) - exported("ray_diffsynth")
    assert {f"{package}.{name}" for name in names} <= set(documented())


def test_the_names_of_the_reference_exist() -> None:
    assert len(documented()) == len(set(documented())) > 20
    for name in documented():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_tools_are_pinned() -> None:
    lines = (ROOT / "docs_site" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 20 and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
