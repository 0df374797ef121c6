"""A cache names its family; only the user names code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_diffsynth.cache.__main__ import main
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.reader import CacheReader

MODULE = "named_by_a_cache"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module in the working folder, and of a package there."""
    (tmp_path / f"{MODULE}.py").write_text("x = 1\n")
    (tmp_path / f"{MODULE}s").mkdir()
    (tmp_path / f"{MODULE}s" / "__init__.py").write_text("")
    (tmp_path / f"{MODULE}s" / "part.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith(MODULE)]:
        del sys.modules[name]


def imported() -> list[str]:
    return [name for name in sys.modules if name.startswith(MODULE)]


def rename(cache: str, **changes: str) -> None:
    path = Path(cache, "manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "family", [MODULE, f"{MODULE}:Pipe", f"{MODULE}s.part", f"{MODULE}s.part:Pipe", "no.such:Pipe"]
)
def test_preview_imports_nothing_that_a_cache_names(
    cache: str, module: None, family: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rename(cache, family=family)
    assert main(["preview", cache, "--model", str(tmp_path), "--output", str(tmp_path / "p.png")]) == 1
    assert f"is of the family {family!r}" in (error := capsys.readouterr().err) and "give it as --family" in error
    assert imported() == []


def test_preview_imports_what_the_user_names(
    cache: str, module: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rename(cache, family="qwen_image")
    assert main(["preview", cache, "--model", str(tmp_path), "--family", f"{MODULE}s.part"]) == 1
    assert "defines no pipeline" in capsys.readouterr().err and f"{MODULE}s.part" in imported()


@pytest.mark.parametrize("dtype", ["load", "hub", "int8", "", "bfloat16 "])
def test_a_cache_names_no_other_thing_of_torch_either(cache: str, dtype: str) -> None:
    rename(cache, dtype=dtype)
    with pytest.raises(CacheError, match="is damaged"):
        CacheReader(cache)
