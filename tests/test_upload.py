"""What `ray job submit --working-dir .` takes along: the program and one's own modules, nothing that is made there."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest

from ray_diffsynth.config import GenerateConfig, JobConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = ("--output_path", "--out", "--output")
SOURCES = ("jobs", "ray_diffsynth")


def upload(folder: Path, target: Path) -> set[str]:
    """Names of the files in Ray's package of a folder."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(folder), target, include_gitignore=True, logger=logging.getLogger("upload"))
    with zipfile.ZipFile(target) as package:
        return {name for name in package.namelist() if not name.endswith("/")}


def documented_outputs() -> set[str]:
    """The relative folders that the commands of README and docs write to, and those that the jobs write to unasked."""
    folders = {JobConfig.output_path, TrainConfig.output_path, GenerateConfig.output_path}
    for page in PAGES:
        for code in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in code.replace("\\\n", " ").splitlines():
                command = line.strip().startswith(("python ", "ray-diffsynth "))
                words = shlex.split(line, comments=True) if command else []
                folders |= {value for flag, value in zip(words, words[1:], strict=False) if flag in WRITTEN}
    return {folder.removeprefix("./") for folder in folders if not folder.startswith("/") and "://" not in folder}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A working folder with what decides the upload, one module of one's own, and nothing made yet."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("mine.py", "my_package/pipeline.py", "run.yaml", "ray_diffsynth/cache/codec.py", "jobs/train.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_what_the_documented_commands_write_stays_here(checkout: Path, tmp_path: Path) -> None:
    before = upload(checkout, tmp_path / "before.zip")
    assert {"mine.py", "my_package/pipeline.py", "run.yaml", "ray_diffsynth/cache/codec.py"} <= before
    folders = documented_outputs()
    assert {"cache/pictures", "models/my_lora", "data/teacher", "pictures"} <= folders
    for folder in folders:
        for name in ("manifest.json", "vae/64x64-0.parquet", "checkpoints/step-1/state.json", "epoch-0.safetensors"):
            (checkout / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / folder / name).touch()
    assert upload(checkout, tmp_path / "after.zip") == before


@pytest.mark.parametrize(
    "name",
    [
        *(".venv/lib/torch.so", ".venv-py312/lib/torch.so", "venv/lib/torch.so", "venv312/lib/torch.so", "env/bin/x"),
        *(".git/objects/00/1", ".git", "ray_diffsynth.egg-info/PKG-INFO", ".hypothesis/examples/1", "build/lib/a.py"),
        *("dist/a.whl", ".mypy_cache/a.json", ".ruff_cache/a", ".pytest_cache/a", ".import_linter_cache/a", "job.log"),
        *(
            "ray_diffsynth/__pycache__/cli.pyc",
            "mlruns/0/meta.yaml",
            "wandb/run-1/a.wandb",
            "demo/cache/a",
            "data/a.png",
        ),
        *("notes/.ipynb_checkpoints/a.ipynb", "tests/test_cli.py", "docs/images/a.png", "benchmarks/results/a.json"),
        *("findings/README.md", "demo_recipe/dit.py", "outputs/a.png", "my_package/my_package.egg-info/PKG-INFO"),
    ],
)
def test_what_is_no_part_of_a_job_stays_here(name: str, checkout: Path, tmp_path: Path) -> None:
    before = upload(checkout, tmp_path / "before.zip")
    (checkout / name).parent.mkdir(parents=True, exist_ok=True)
    (checkout / name).touch()
    assert upload(checkout, tmp_path / "after.zip") == before


def test_all_of_the_program_is_taken_along(checkout: Path, tmp_path: Path) -> None:
    for name in SOURCES:
        shutil.copytree(
            ROOT / name, checkout / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.log")
        )
    program = {path.relative_to(checkout).as_posix() for name in SOURCES for path in (checkout / name).rglob("*")}
    needed = {name for name in program if (checkout / name).is_file()}
    assert len(needed) > 150 and needed <= upload(checkout, tmp_path / "package.zip")
