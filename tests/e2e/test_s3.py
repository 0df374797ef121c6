"""Data, cache and stage 2 on an S3-compatible server: the endpoint comes from the environment, as users give it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import LORA
from tests.s3_server import s3_server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment of a client of a server on loopback."""
    with s3_server() as environment:
        yield {**os.environ, **environment}


def run(environment: dict[str, str], *command: str) -> str:
    """Run Python with these arguments; its output. Fails with it when the exit code is not 0."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


UPLOAD = """
import sys, fsspec
from pathlib import Path
fs = fsspec.filesystem("s3")
fs.mkdir("lab")
for path in Path(sys.argv[1]).rglob("*"):
    if path.is_file():
        fs.put_file(str(path), f"lab/data/{path.relative_to(sys.argv[1]).as_posix()}")
"""

COMPARE = """
import sys, torch
from ray_diffsynth.cache.reader import CacheReader
mine, local = CacheReader(sys.argv[1]), CacheReader(sys.argv[2])
assert list(mine.sample_ids) == list(local.sample_ids)
for a, b in zip(mine.read(range(12)), local.read(range(12)), strict=True):
    assert all(torch.equal(a[name], b[name]) for name in b)
"""


def test_both_stages_on_s3(
    s3: dict[str, str], tiny_qwen: Path, dataset: Path, fp32_cache: Path, tmp_path: Path
) -> None:
    run(s3, "-c", UPLOAD, str(dataset))
    model = ["--model", str(tiny_qwen), "--dtype", "float32"]
    stage1 = ["jobs/preprocess.py", *model, "--dataset_base_path", "s3://lab/data", "--output_path", "s3://lab/cache"]
    assert "cache of 12 samples in s3://lab/cache" in run(s3, *stage1)
    assert "input_latents 0 encoded 12 reused" in run(s3, *stage1)
    run(s3, "-c", COMPARE, "s3://lab/cache", str(fp32_cache))
    assert "0 damaged" in run(s3, "-m", "ray_diffsynth.cache", "verify", "s3://lab/cache")
    stage2 = ["jobs/train.py", *model, "--dataset_base_path", "s3://lab/cache", "--output_path", str(tmp_path / "lora")]
    run(s3, *stage2, "--max_steps", "2", "--lora_rank", "4", "--lora_target_modules", LORA)
    assert list((tmp_path / "lora").glob("*.safetensors"))
