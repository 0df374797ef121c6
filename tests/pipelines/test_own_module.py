"""A pipeline of one's own by the name of its module: where it is looked for, and what is said when it is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_diffsynth.pipelines.registry import FAMILIES, FamilyError, get_pipeline_class

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "from ray_diffsynth.pipelines.core.base import BasePipeline\nclass Mine(BasePipeline): ...\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def refusal(family: str) -> str:
    with pytest.raises(FamilyError) as refused:
        get_pipeline_class(family)
    return str(refused.value)


def test_a_module_of_the_working_folder(folder: Path) -> None:
    (folder / "mine_alone.py").write_text(SOURCE)
    (folder / "mine_beside_another.py").write_text(SOURCE + "class Other(BasePipeline): ...\n")
    assert get_pipeline_class("mine_alone").__name__ == "Mine"
    assert get_pipeline_class("mine_alone:Mine").__name__ == "Mine"
    assert get_pipeline_class("mine_beside_another:Other").__name__ == "Other"
    assert "name one BasePipeline subclass: mine_beside_another:Class" in refusal("mine_beside_another")


def test_a_package_of_the_working_folder(folder: Path) -> None:
    (folder / "my_things").mkdir()
    (folder / "my_things" / "__init__.py").touch()
    (folder / "my_things" / "pipeline.py").write_text(SOURCE)
    assert get_pipeline_class("my_things.pipeline").__name__ == "Mine"


def test_the_working_folder_hides_no_library(folder: Path) -> None:
    (folder / "json.py").write_text("raise RuntimeError('not the library')\n")
    (folder / "mine_and_json.py").write_text(
        "import sys; sys.modules.pop('json')\nimport json; json.dumps(1)\n" + SOURCE
    )
    kept = sys.modules["json"]
    try:
        assert get_pipeline_class("mine_and_json").__name__ == "Mine"
    finally:
        sys.modules["json"] = kept


@pytest.mark.parametrize(
    "family", ["no_such_module", "no_such_module:Class", "no_such_package.module", "1st", "", "a-b"]
)
def test_what_is_nowhere_lists_the_families_and_how_to_name_ones_own(family: str, folder: Path) -> None:
    told = refusal(family)
    assert repr(family) in told and ", ".join(sorted(FAMILIES)) in told
    assert "my_module[:Class]" in told and "working folder" in told


def test_the_nearest_family_is_named(folder: Path) -> None:
    assert "did you mean qwen_image" in refusal("qwen-image")
    assert "did you mean z_image" in refusal("zimage")


@pytest.mark.parametrize("family", ["mine.py", "./mine.py", "folder/mine.py", "mine.py:Mine"])
def test_a_file_in_the_place_of_a_module(family: str, folder: Path) -> None:
    (folder / "mine.py").write_text(SOURCE)
    assert "name the module and not its file, --family mine;" in refusal(family)


def test_a_module_that_lacks_another(folder: Path) -> None:
    (folder / "mine_lacking.py").write_text("import no_such_library\n")
    assert "needs the module no_such_library" in refusal("mine_lacking")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("\nvalue = {}['rank']\n", "KeyError: 'rank' ({}, line 2)"),
        ("def half(:\n", "SyntaxError: invalid syntax ({}, line 1)"),
        ("from json import no_such_name\n", "ImportError: cannot import name 'no_such_name'"),
    ],
)
def test_a_module_that_fails(source: str, told: str, folder: Path) -> None:
    (folder / "mine_failing.py").write_text(source)
    said = refusal("mine_failing")
    name = "mine_failing.py" if "SyntaxError" in told else str(folder / "mine_failing.py")
    assert "the family 'mine_failing' cannot be imported" in said and told.format(name) in said


def test_a_module_without_a_pipeline(folder: Path) -> None:
    assert "json" in (told := refusal("json")) and "defines no pipeline" in told and "qwen_image" in told


_ACTOR = """
import ray
from ray_diffsynth.pipelines.registry import get_pipeline_class
from ray_diffsynth.cluster.session import ray_session

@ray.remote(num_cpus=1)
def name(family):
    return get_pipeline_class(family).__name__

with ray_session():
    print("found", ray.get([name.remote("mine_on_ray"), name.remote("mine_on_ray:Mine")]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_rays_processes_find_it_too(tmp_path: Path) -> None:
    (tmp_path / "mine_on_ray.py").write_text(SOURCE)
    (tmp_path / "script").mkdir()
    script = tmp_path / "script" / "job.py"
    script.write_text(_ACTOR)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "found ['Mine', 'Mine']" in done.stdout, done.stderr
