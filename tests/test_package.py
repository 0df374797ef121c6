"""The package as it is installed: what the wheel holds, and its commands away from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ray_diffsynth
from ray_diffsynth.cli import COMMANDS, run_program
from ray_diffsynth.demo import demo_model_path
from ray_diffsynth.demo.draw import draw_dataset

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git knows."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("ray_diffsynth", "jobs", "demo_recipe", "tests", "pyproject.toml", "README.md", "LICENSE"):
        listed = subprocess.run(["git", "ls-files", name], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for file in listed.splitlines():
            if (ROOT / file).exists():
                (source / file).parent.mkdir(parents=True, exist_ok=True)
                (source / file).write_bytes((ROOT / file).read_bytes())
    # By the setuptools that is installed: a test needs no network.
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    (built,) = folder.glob("ray_diffsynth-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with the installed package and its script, outside the checkout."""
    target = wheel.parent / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True)
    return target


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    script = [sys.executable, str(installed / "bin" / "ray-diffsynth"), *words]
    return subprocess.run(script, cwd=installed.parent, env=environment, capture_output=True, text=True)


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ray_diffsynth"}
    model = {path.relative_to(ROOT).as_posix() for path in demo_model_path().rglob("*") if path.is_file()}
    assert model <= names and "ray_diffsynth/py.typed" in names
    assert "ray_diffsynth/report/templates/train.html.j2" in names
    assert not [name for name in names if "recipe" in name]


@pytest.mark.ray  # a dry run reads the headers of the images by Ray Data
@pytest.mark.slow
def test_the_installed_commands(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, "--help")
    assert shown.returncode == 0 and re.findall(r"^  (\w+)  ", shown.stdout, re.MULTILINE) == list(COMMANDS)
    assert "ray-diffsynth cache" in run(installed, "cache", "--help").stdout
    assert "usage: ray-diffsynth train" in run(installed, "train", "--help").stdout
    wrong = run(installed, "trian")
    assert wrong.returncode == 2 and "train" in wrong.stderr and "Traceback" not in wrong.stderr
    elsewhere = run(installed, "train", "--task", "sft:data_process", "--dataset_base_path", "x", "--model", "y")
    assert elsewhere.returncode == 2 and "ray-diffsynth preprocess" in elsewhere.stderr
    draw_dataset(tmp_path / "data", 2)
    data = ["--dataset_base_path", str(tmp_path / "data"), "--output_path", str(tmp_path / "cache")]
    tried = run(installed, "preprocess", "--model", str(demo_model_path()), *data, "--dry_run")
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert not (tmp_path / "cache").exists()


def test_the_table_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown and command.help in shown for name, command in COMMANDS.items())
    assert run_program(["trian"]) == 2
    assert "trian is no command; did you mean train?" in capsys.readouterr().err


def test_every_public_name_resolves_with_its_type() -> None:
    """The names for a type checker are those that are imported on first use."""
    source = (ROOT / "ray_diffsynth" / "__init__.py").read_text(encoding="utf-8")
    assert set(re.findall(r" as (\w+)$", source, re.MULTILINE)) == set(ray_diffsynth.__all__) - {"__version__"}
    for name in ray_diffsynth.__all__:
        assert getattr(ray_diffsynth, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        ray_diffsynth.Pipeline  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    code = "import sys, ray_diffsynth; print(sorted({'torch', 'ray', 'diffusers', 'transformers'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
