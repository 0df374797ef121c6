"""One Ray, one dataset and one cache for the end-to-end tests: starting an encoder costs seconds of imports."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.config import PreprocessConfig, TrainConfig
from ray_diffsynth.demo.draw import draw_dataset

LORA = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of 64x64 and four of 32x64; two of them share a caption."""
    root = tmp_path_factory.mktemp("dataset")
    rows = draw_dataset(root, 8).read_text().splitlines()
    wide = draw_dataset(root / "wide", 4, seed=1, height=32, width=64).read_text().splitlines()
    rows += [f"wide/{line}" for line in wide[1:]]
    rows[-1] = rows[-1].split(",")[0] + "," + rows[1].split(",", 1)[1]
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


Preprocess = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def preprocess(local_ray: None) -> Preprocess:
    """preprocess(model, data, output, **options) -> report; on the session's Ray."""
    from ray_diffsynth.preprocess.job import run

    def call(model: Path, data: Path, output: Path, **options: Any) -> dict[str, Any]:
        values = {"dtype": "float32", **options}
        return run(PreprocessConfig(model=str(model), dataset_base_path=str(data), output_path=str(output), **values))

    return call


@pytest.fixture(scope="session")
def fp32_cache(
    tiny_qwen: Path, dataset: Path, preprocess: Preprocess, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The dataset's cache in fp32, encoded one sample at a time. Read it, never write to it."""
    cache = tmp_path_factory.mktemp("cache") / "fp32"
    preprocess(tiny_qwen, dataset, cache)
    return cache


@pytest.fixture
def own_cache(fp32_cache: Path, tmp_path: Path) -> Path:
    """A copy of the cache that a test may change."""
    return Path(shutil.copytree(fp32_cache, tmp_path / "cache"))


def train_config(model: Path, base: Path, output: Path, **options: Any) -> TrainConfig:
    """A short fp32 training run; `options` on top."""
    values: dict[str, Any] = {
        "task": "sft:train",
        "dtype": "float32",
        "lora_rank": 4,
        "lora_target_modules": LORA,
        "learning_rate": 1e-3,
        **options,
    }
    return TrainConfig(model=str(model), dataset_base_path=str(base), output_path=str(output), **values)
