"""Mistakes that are told before Ray starts: names of models, files and classes that are not there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.data.formats import DatasetError
from ray_diffsynth.errors import UserError
from ray_diffsynth.models.lora_file import LoraError
from ray_diffsynth.pipelines.base import PipelineError
from ray_diffsynth.pipelines.registry import FamilyError
from ray_diffsynth.training import job
from ray_diffsynth.training.optim import OptimizerError
from ray_diffsynth.training.setup import TrainingError
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.csv").write_text("image,prompt\na.png,x\n")
    (tmp_path / "data" / "lora.safetensors").write_text("no LoRA")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"dataset_base_path": "absent"}, DatasetError, "absent does not exist; check --dataset_base_path"),
        ({"dataset_metadata_path": "absent.csv"}, DatasetError, "absent.csv does not exist"),
        ({"lora_base_model": "ditt"}, PipelineError, "no model 'ditt' to train; did you mean dit"),
        ({"trainable_models": "text_encodr"}, PipelineError, "did you mean text_encoder"),
        ({"family": "wan"}, FamilyError, "needs AutoencoderKLWan, but .* holds AutoencoderKLQwenImage; leave --family"),
        ({"lora_checkpoint": "absent.safetensors"}, LoraError, "absent.safetensors does not exist; check the path"),
        ({"preset_lora_path": "lora.safetensors"}, LoraError, "not a readable safetensors file"),
        ({"preset_lora_path": "."}, LoraError, "cannot be read: .*directory.*; give one .safetensors file"),
        ({"customized_optimizer": "torch.optim:Nope"}, OptimizerError, "torch.optim:Nope cannot be imported"),
        ({"customized_optimizer": "torch.nn:Linear"}, OptimizerError, "no subclass of torch.optim.Optimizer"),
        ({"validation_prompts": "absent.txt"}, TrainingError, "absent.txt does not exist"),
        ({"resume": "absent"}, UserError, "absent is no checkpoint: .*; a checkpoint is a folder checkpoints/step-"),
    ],
)
def test_a_mistake_is_told_before_ray_starts(
    tiny_qwen: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    kind: type[UserError],
    message: str,
) -> None:
    def started(*arguments: Any, **options: Any) -> None:
        raise AssertionError("Ray would start")

    monkeypatch.setattr(job, "ray_session", started)
    monkeypatch.chdir(data)
    config = make_config(tiny_qwen, data, tmp_path / "out", **{"task": "sft", **changes})
    with pytest.raises(kind, match=message):
        job.run(config)
    assert not (tmp_path / "out").exists()


def test_sample_pictures_need_the_whole_model(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "ray_session", lambda *arguments, **options: pytest.fail("Ray would start"))
    transformer = json.dumps([str(path) for path in sorted((tiny_qwen / "transformer").glob("*.safetensors"))])
    config = make_config(tiny_qwen, make_cache(), tmp_path / "out", validation_prompts="a cat")
    with pytest.raises(TrainingError, match=r"needs the whole model, but .*vae.* is not given"):
        job.run(replace(config, model=None, model_paths=transformer))
