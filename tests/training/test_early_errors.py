"""Mistakes that are told before Ray starts: names of models, files and classes that are not there."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.data.formats import DatasetError
from ray_diffsynth.errors import UserError
from ray_diffsynth.models.lora_file import LoraError
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.registry import FamilyError
from ray_diffsynth.training import local
from ray_diffsynth.training.checkpoint import CheckpointError
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.optim import OptimizerError, optimizer_class
from ray_diffsynth.training.ray import job
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config, train_here


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


def test_sample_images_need_the_whole_model(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "ray_session", lambda *arguments, **options: pytest.fail("Ray would start"))
    transformer = json.dumps([str(path) for path in sorted((tiny_qwen / "transformer").glob("*.safetensors"))])
    config = make_config(tiny_qwen, make_cache(), tmp_path / "out", validation_prompts="a cat")
    with pytest.raises(TrainingError, match=r"needs the whole model, but .*vae.* is not given"):
        job.run(replace(config, model=None, model_paths=transformer))


def test_an_optimizer_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.chdir(tmp_path)
    Path("working_folder_optimizer.py").write_text("import torch\n\n\nclass Own(torch.optim.SGD):\n    pass\n")
    assert optimizer_class("working_folder_optimizer:Own").__name__ == "Own"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("\nvalue = {}['rank']\n", r"KeyError: 'rank' \(.*failing_optimizer.py, line 2\); mend it there"),
        ("def half(:\n", r"SyntaxError: invalid syntax \(failing_optimizer.py, line 1\); mend it there"),
        ("import no_such_library\n", "No module named 'no_such_library'; install its package"),
        ("", "has no attribute 'Own'"),
    ],
)
def test_an_optimizer_whose_module_fails(
    source: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "failing_optimizer", raising=False)
    Path("failing_optimizer.py").write_text(source)
    with pytest.raises(OptimizerError, match=f"failing_optimizer:Own cannot be imported: .*{told}"):
        optimizer_class("failing_optimizer:Own")


def test_a_chosen_checkpoint_of_other_options_is_refused_before_anything_is_moved(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train_here(make_config(tiny_qwen, make_cache(), out, max_steps=2, save_steps=1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    options = {"max_steps": 2, "save_steps": 1, "resume": str(out / "checkpoints/step-00000001")}
    for run in (job.run, local.run):
        with pytest.raises(CheckpointError, match=r"step-00000001 .*learning_rate: 0.01 there, 0.001 here; lora_rank"):
            run(make_config(tiny_qwen, make_cache(), out, learning_rate=1e-3, lora_rank=2, **options))
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
