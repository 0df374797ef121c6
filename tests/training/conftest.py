"""A tiny model, a few drawn images in two sizes, and caches of them written without Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.demo.draw import draw_dataset
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.data.opening import open_data
from ray_diffsynth.training.data.source import DatasetSource
from tests.training.helpers import Runs, make_config, write_cache


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of 64x64 and four of 32x64."""
    root = tmp_path_factory.mktemp("pictures")
    table = draw_dataset(root, 6, height=64, width=64).read_text().splitlines()
    other = draw_dataset(root / "wide", 4, seed=1, height=32, width=64).read_text().splitlines()
    (root / "metadata.csv").write_text("\n".join([*table, *(f"wide/{line}" for line in other[1:])]) + "\n")
    return root


CacheMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_cache(tiny_qwen: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheMaker:
    """make_cache(**config changes) -> a cache of `images` for that configuration; made once for each."""
    made: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("cache")
            plan = RunPlan.resolve(make_config(tiny_qwen, images, folder, task="sft", **changes))
            data = open_data(plan)
            assert isinstance(data, DatasetSource)
            made[key] = write_cache(plan, data, folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def without_encoders(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with the weights of the encoders deleted."""
    root = tmp_path_factory.mktemp("half") / "tiny"
    shutil.copytree(tiny_qwen, root)
    for folder in ("text_encoder", "tokenizer"):
        shutil.rmtree(root / folder)
    for weights in (root / "vae").glob("*.safetensors"):
        weights.unlink()
    return root


@pytest.fixture(scope="session")
def runs(tiny_qwen: Path, make_cache: CacheMaker) -> Iterator[Runs]:
    """runs(output, **options) -> exit codes of a training run on the cache, in processes of its own."""
    started = Runs(tiny_qwen, make_cache())
    yield started
    started.close()
