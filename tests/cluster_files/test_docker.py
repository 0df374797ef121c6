"""The Dockerfile: hadolint's rules, what it copies, and its steps of installation in a fresh environment.

No image is built: there is no Docker here. The base image, apt-get and the download of torch are not tested.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from fnmatch import fnmatch
from pathlib import Path

import pytest

from cluster.check.versions import pinned
from tests.cluster_files.commands import BIN

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "cluster" / "docker" / "Dockerfile"
ALLOWED = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()


def targets() -> dict[str, list[tuple[str, str]]]:
    """Target -> its instructions in order, those of the stage that it stands on first."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {}
    lines: list[tuple[str, str]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            lines = found[name] = list(found.get(base, []))
        lines.append((instruction, rest))
    return found


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([str(BIN / "hadolint"), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_runs_as_a_user_and_has_what_kuberay_calls(target: str) -> None:
    instructions = targets()[target]
    users = [rest for instruction, rest in instructions if instruction == "USER"]
    assert users == ["1000"] and instructions[-1] == ("WORKDIR", "/home/ray")
    installed = " ".join(rest for instruction, rest in instructions if instruction == "RUN")
    assert "wget" in installed and "useradd" in installed and "--uid 1000" in installed
    # KubeRay's operator may start Ray by a login shell, which takes PATH from /etc/profile.
    assert not any(instruction == "ENV" and "PATH=" in rest for instruction, rest in instructions)
    assert not any(re.search(r"(TOKEN|SECRET|PASSWORD|KEY)=", rest) for _, rest in instructions)
    for package, version in re.findall(r"([\w-]+)==([\w.]+)", installed):
        assert pinned()[package] == version


def test_only_what_is_copied_is_sent_to_docker() -> None:
    """A path of the last pattern that fits is sent if that one begins with `!`, as Docker reads the file."""
    copied = {word for _, lines in targets().items() for name, rest in lines if name == "COPY" for word in rest.split()}
    sources = {source for source in copied if not source.startswith("./")}
    assert sources == {line[1:] for line in ALLOWED if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)
    for path in (".git", ".venv", "data", "tests"):
        fitting = [line for line in ALLOWED if fnmatch(path, line.lstrip("!"))]
        assert not fitting[-1].startswith("!"), path


def test_the_images_differ_in_torch_alone() -> None:
    cpu, gpu = (
        [line for line in targets()[name] if line[0] != "FROM" and not re.search("torch==|NVIDIA", line[1])]
        for name in ("cpu", "gpu")
    )
    assert cpu == gpu and ("RUN", 'pip install -c constraints.txt ".[$EXTRAS]"') in cpu


@pytest.mark.slow
def test_the_steps_of_installation_in_a_fresh_environment(tmp_path: Path) -> None:
    """pip runs as in the image, from a copy of what is copied there, without a network: what is pinned is here already.

    So the constraints must be those of this environment, and what is copied must do to build the package.
    """
    # pip too is that which is here: to install another into the environment takes longer than all that it does there.
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (site / "from_here.pth").write_text(sysconfig.get_path("purelib"))
    pip = python.with_name("pip")
    pip.write_text(f'#!/bin/sh\nexec {python} -m pip "$@"\n')
    pip.chmod(0o755)
    folder = tmp_path / "image"
    folder.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as --no-build-isolation=0: not isolated
    }
    ran = 0
    for instruction, rest in targets()["cpu"]:
        if instruction == "ARG":
            name, _, value = rest.partition("=")
            environment[name] = value
        elif instruction == "COPY":
            *sources, destination = rest.split()
            for source in sources:
                into = folder / destination
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, into, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, into)
        elif instruction == "RUN" and rest.startswith("pip install"):
            done = subprocess.run(
                ["sh", "-ec", rest], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            ran += 1
    assert ran == 2
    show = "import ray_diffsynth; print(ray_diffsynth.__file__)"
    found = subprocess.run([str(python), "-c", show], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(site))
    command = [str(python.parent / "ray-diffsynth"), "preprocess", "--help"]
    assert "--dataset_base_path" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (folder / "jobs" / "train.py").exists() and sys.prefix not in found
