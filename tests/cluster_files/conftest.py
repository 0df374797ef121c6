"""What the tests of Slurm's and SkyPilot's scripts share: a checkout with an environment, images, and free ports."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from ray_diffsynth.demo.draw import draw_dataset

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Checkout:
    """A folder with `cluster/`, `jobs/`, `ray_diffsynth/` and `.venv`, an environment without Ray's variables, and four
    images.

    number: of a job; ports from `port` on are free.
    """

    folder: Path
    environment: dict[str, str]
    images: Path
    number: int
    port: int

    @property
    def scratch(self) -> tuple[str, ...]:
        """Beginnings of the folders in which the Rays of Slurm's job and of SkyPilot's task have their files."""
        return (f"/tmp/ray-{self.number}-", *(f"/tmp/ray-job-{rank}-{self.port}" for rank in range(2)))

    @property
    def left(self) -> list[psutil.Process]:
        """Processes of these Rays that are alive."""
        return [
            process
            for process in psutil.process_iter(["cmdline", "status"])
            if process.info["status"] != psutil.STATUS_ZOMBIE
            and any(place in word for word in process.info["cmdline"] or () for place in self.scratch)
        ]


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("cluster", "jobs", "ray_diffsynth"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    draw_dataset(tmp_path / "images", 4)
    number = next(number for number in range(os.getpid(), os.getpid() + 4000) if _free(_port(number)))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM", "SKYPILOT"))}
    environment = {
        **kept,
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "200000000",
    }
    made = Checkout(folder, environment, tmp_path / "images", number, _port(number))
    yield made
    for process in made.left:
        process.kill()
    for place in made.scratch:
        for found in Path("/tmp").glob(f"{Path(place).name}*"):
            shutil.rmtree(found, ignore_errors=True)


def _port(number: int) -> int:
    return 20000 + number % 4000 * 3


def _free(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("localhost", port)) != 0
