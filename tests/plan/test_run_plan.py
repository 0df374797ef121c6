"""A plan is made once, travels whole, and names the same units and weights wherever it arrives."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.config import GenerateConfig, PreprocessConfig
from ray_diffsynth.errors import ConfigError
from ray_diffsynth.models import locate
from ray_diffsynth.models.folder import ModelFolderError
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.stages import plan_stages
from ray_diffsynth.plan.run_plan import RunPlan
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config


def resolved(job: str, model: Path, folder: Path, cache: Path, **options: Any) -> Any:
    if job == "preprocess":
        return RunPlan.resolve(PreprocessConfig(model=str(model), dataset_base_path=str(folder), **options))
    if job == "train":
        return RunPlan.resolve(make_config(model, cache, folder, **options))
    return RunPlan.resolve(GenerateConfig(model=str(model), prompt="a cat", output_path=str(folder), **options))


@pytest.mark.parametrize("job", ["preprocess", "train", "generate"])
def test_a_plan_travels_whole_and_cannot_be_changed(
    job: str, tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    plan = resolved(job, tiny_qwen, tmp_path, make_cache())
    arrived = pickle.loads(pickle.dumps(plan))
    assert arrived == plan and arrived.on_this_machine() is arrived
    with pytest.raises(dataclasses.FrozenInstanceError):
        arrived.family = "flux"


@pytest.mark.parametrize(("trained", "models"), [("dit", ("dit",)), ("text_encoder", ("dit", "text_encoder"))])
def test_the_split_that_travels_is_the_one_that_was_planned(
    trained: str, models: tuple[str, ...], tiny_qwen: Path, images: Path, tmp_path: Path
) -> None:
    options = {"lora_base_model": trained, "lora_target_modules": "q_proj" if trained != "dit" else None}
    plan = RunPlan.resolve(make_config(tiny_qwen, images, tmp_path, task="sft", **options))
    pipe = plan.configured()
    stages = plan_stages(pipe, plan.task, plan.config.trained, plan.sample.inputs)
    assert plan.split.stages(pipe) == stages and plan.split.stages(pipe).stage2_models(pipe) == models
    other = plan.configured()
    bound = plan.split.stages(other)
    assert all(unit in other.units for group in bound.groups for unit in group.units)
    other.units.pop()
    with pytest.raises(PipelineError, match="where the run was planned; give all machines the same version"):
        plan.split.stages(other)


def test_a_machine_whose_cache_of_the_hub_lies_elsewhere_finds_the_model_there(
    tiny_qwen: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = [Path(shutil.copytree(tiny_qwen, tmp_path / "driver"))]
    monkeypatch.setattr(locate, "find_repository", lambda *_, **__: at[0])
    plan = RunPlan.resolve(PreprocessConfig(model="some/model", dataset_base_path=str(images)))
    assert plan.on_this_machine() is plan
    at[0] = at[0].rename(tmp_path / "worker")
    there = plan.on_this_machine(["vae"])
    assert there == replace(plan, source=there.source) and there.source.root == str(tmp_path / "worker")
    weights = next((tmp_path / "worker/vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelFolderError, match="the vae of .*worker/vae on this machine is not the one that the run"):
        plan.on_this_machine(["vae"])
    assert plan.on_this_machine(["text_encoder"]).source.root == str(tmp_path / "worker")


def test_lora_targets_are_named_before_anything_is_loaded(tiny_qwen: Path, images: Path, tmp_path: Path) -> None:
    none = {"lora_target_modules": None}
    plan = RunPlan.resolve(make_config(tiny_qwen, images, tmp_path, task="sft", **none))
    assert plan.target_modules == {"dit": ",".join(plan.pipeline.lora_targets)}
    with pytest.raises(ConfigError, match="--lora_target_modules is missing: .* has no default for 'text_encoder'"):
        RunPlan.resolve(make_config(tiny_qwen, images, tmp_path, task="sft", lora_base_model="text_encoder", **none))
