"""Many small pictures, and stage 1 on them with the family that counts its encoder calls."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.config import PreprocessConfig
from tests.preprocess.counting import FAMILY, build_model

ROOT = Path(__file__).resolve().parents[2]
PICTURES, CAPTIONS = 320, 40
SHARD = 64
"""Pictures in one file of the cache at this size."""


def draw(folder: Path, count: int, captions: int) -> Path:
    """`count` different pictures of 64x64 and a metadata.csv with that many distinct captions."""
    folder.mkdir()
    rows = []
    for number in range(count):
        colour = tuple(int(v) for v in np.random.default_rng(number).integers(0, 256, 3))
        picture = Image.new("RGB", (64, 64), colour)
        picture.putpixel((0, 0), (number % 256, number // 256, 1))
        picture.save(folder / f"{number:04d}.png")
        rows.append((f"{number:04d}.png", f"caption number {number % captions}"))
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt"), *rows])
    return folder


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of pictures and two of captions."""
    return draw(tmp_path_factory.mktemp("many") / "data", PICTURES, CAPTIONS)


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures with a caption each."""
    return draw(tmp_path_factory.mktemp("few") / "data", 12, 12)


Stage1 = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def stage1(local_ray: None) -> Stage1:
    """stage1(model, data, cache, **options) -> report, with the counting family, on the session's Ray."""
    from ray_diffsynth.preprocess.job import run

    def call(model: Path, data: Path, cache: Path, **options: Any) -> dict[str, Any]:
        values = {"batch_size": 8, **options}
        return run(
            PreprocessConfig(
                model=str(model), family=FAMILY, dataset_base_path=str(data), output_path=str(cache), **values
            )
        )

    return call


@pytest.fixture(scope="session")
def whole(many: Path, stage1: Stage1, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `many` from a run that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    stage1(build_model(root / "model"), many, root / "cache")
    return root / "cache"


@pytest.fixture
def job() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """job(model, data, cache, *flags) starts jobs/preprocess.py; what is left of it is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(model: Path, data: Path | str, cache: Path | str, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "jobs" / "preprocess.py"), "--model", str(model), "--family", FAMILY]
        command += ["--dataset_base_path", str(data), "--output_path", str(cache), "--batch_size", "8", *flags]
        # A session of its own, so that its Ray can be ended with it.
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until `what` is true; fails when the process ends first."""
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, f"the job ended too early:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"nothing came within {seconds} s"
        time.sleep(0.02)


def files(cache: Path, *names: str) -> dict[str, bytes]:
    """The committed files of a cache: path -> bytes, without reports, times and the memo of the scan."""
    folders = names or ("vae", "text_encoder", "index", "quarantine")
    found = {
        str(path.relative_to(cache)): path.read_bytes() for name in folders for path in (cache / name).glob("*.parquet")
    }
    return found | {"manifest.json": (cache / "manifest.json").read_bytes()}
