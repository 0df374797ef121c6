"""Many small images, and stage 1 on them with the family that counts its encoder calls."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ray_diffsynth.cluster.nodes import Process
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.preprocess.datasink import ShardSink
from ray_diffsynth.preprocess.decode import Decoder
from ray_diffsynth.preprocess.encoder import Encoder
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.messages import shard_row
from tests.preprocess.counting import FAMILY, build_model
from tests.preprocess.failing import Bench
from tests.processes import kill_session, wait_for_session

ROOT = Path(__file__).resolve().parents[2]
IMAGES, CAPTIONS = 320, 40
SHARD = 64
"""Images in one file of the cache at this size."""


def draw(folder: Path, count: int, captions: int) -> Path:
    """`count` different images of 64x64 and a metadata.csv with that many distinct captions."""
    folder.mkdir()
    rows = []
    for number in range(count):
        colour = tuple(int(v) for v in np.random.default_rng(number).integers(0, 256, 3))
        image = Image.new("RGB", (64, 64), colour)
        image.putpixel((0, 0), (number % 256, number // 256, 1))
        image.save(folder / f"{number:04d}.png")
        rows.append((f"{number:04d}.png", f"caption number {number % captions}"))
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt"), *rows])
    return folder


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of images and two of captions."""
    return draw(tmp_path_factory.mktemp("many") / "data", IMAGES, CAPTIONS)


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images with a caption each."""
    return draw(tmp_path_factory.mktemp("few") / "data", 12, 12)


@pytest.fixture
def data(tmp_path: Path, few: Path) -> Path:
    """A copy of `few` that a test may change."""
    return Path(shutil.copytree(few, tmp_path / "data"))


@pytest.fixture
def bench(tmp_path: Path, few: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """An encoder whose unit fails as the test says."""
    return Bench(tmp_path, few, monkeypatch)


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


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Stage1:
    """As `stage1`, but every task and actor is a call in this process: the same code without Ray."""
    from ray_diffsynth.preprocess import job as job_module
    from ray_diffsynth.preprocess import scan as scan_module

    here = SimpleNamespace(up=lambda: True, for_scan=lambda: Process({"CPU": 0.5}), for_encoding=lambda runs: {})
    monkeypatch.setattr(job_module, "ray_session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(job_module, "machines_of", lambda *_: nullcontext(here))
    monkeypatch.setattr(job_module, "encode_all", encode_inline)
    monkeypatch.setattr(scan_module, "ray", InlineRay)

    def call(model: Path, data: Path, cache: Path, **options: Any) -> dict[str, Any]:
        values = {"batch_size": 8, **options}
        return job_module.run(
            PreprocessConfig(
                model=str(model), family=FAMILY, dataset_base_path=str(data), output_path=str(cache), **values
            )
        )

    return call


class InlineRay:
    """The part of ray that the scan uses, as plain calls."""

    @staticmethod
    def remote(**_: Any) -> Callable[..., Any]:
        return lambda function: SimpleNamespace(remote=function)

    @staticmethod
    def get(value: Any) -> Any:
        return value


def encode_inline(runs: Sequence[GroupRun], pools: object, *, cache: str, codec: str, environment: object) -> None:
    """Decoder, encoder and sink, one shard after another."""
    for run in runs:
        sink = ShardSink(cache, run.name, run.encoder.group.parameters, codec)
        encoder = Encoder(run.encoder) if run.shards else None
        for shard in run.shards:
            assert encoder is not None
            block = pa.Table.from_pylist([encoder(Decoder(run.encoder)(shard_row(shard)))])
            run.add_results(sink.write([block], None))


@pytest.fixture(scope="session")
def whole(many: Path, stage1: Stage1, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `many` from a run that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    stage1(build_model(root / "model"), many, root / "cache")
    return root / "cache"


@dataclass(frozen=True)
class Running:
    """A started jobs/preprocess.py and where its messages go."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Wait until `what` is true, as long as the test may last; fails when the process ends first."""
        while not what():
            assert self.process.poll() is None, f"the job ended too early:\n{self.log.read_text()}"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL the driver, and wait until its Ray, which ends with it, has ended too."""
        self.process.kill()
        wait_for_session(self.process)


Job = Callable[..., Running]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """job(model, data, cache, *flags) starts jobs/preprocess.py; what is left of it is killed at the end."""
    started: list[Running] = []

    def start(model: Path, data: Path, cache: Path, *flags: str) -> Running:
        command = [sys.executable, str(ROOT / "jobs" / "preprocess.py"), "--model", str(model), "--family", FAMILY]
        command += ["--dataset_base_path", str(data), "--output_path", str(cache), "--batch_size", "8", *flags]
        path = tmp_path / f"job-{len(started)}.log"
        with open(path, "wb") as log:
            # A session of its own, so that its processes can be ended with it.
            process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=log, stderr=log)
        started.append(Running(process, path))
        return started[-1]

    yield start
    for running in started:
        kill_session(running.process)


def files(cache: Path, *names: str) -> dict[str, bytes]:
    """The committed files of a cache: path -> bytes, without reports, times and the scan's cache."""
    folders = names or ("vae", "text_encoder", "index", "quarantine")
    found = {
        str(path.relative_to(cache)): path.read_bytes() for name in folders for path in (cache / name).glob("*.parquet")
    }
    return found | {"manifest.json": (cache / "manifest.json").read_bytes()}
