"""The package as it is installed: what the wheel holds, its command line's table."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ray_diffsynth.cli import COMMANDS, run_program
from ray_diffsynth.demo import demo_model_path

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
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True)
    (built,) = folder.glob("ray_diffsynth-*.whl")
    return built


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ray_diffsynth"}
    model = {path.relative_to(ROOT).as_posix() for path in demo_model_path().rglob("*") if path.is_file()}
    assert model <= names and "ray_diffsynth/py.typed" in names
    assert "ray_diffsynth/report/templates/train.html.j2" in names
    assert not [name for name in names if "recipe" in name]


def test_the_table_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown and command.help in shown for name, command in COMMANDS.items())
    assert run_program(["trian"]) == 2
    assert "trian is no command; did you mean train?" in capsys.readouterr().err
