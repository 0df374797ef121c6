"""Gradients through what stage 1 would do: parts of the text encoder, two LoRAs, a conditioner of the user's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.errors import ConfigError
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.build import build_module
from ray_diffsynth.training.data.opening import open_data
from ray_diffsynth.training.data.source import DatasetSource
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.result import TrainResult
from tests.training.conftest import CacheMaker
from tests.training.helpers import LORA, make_config, train_here, write_cache
from tests.training.own_family import STYLES, Styler

STEPS = 3
LAYER = "text_encoder.model.language_model.layers.1"
BOTH = {"lora_base_model": "text_encoder,dit", "lora_target_modules": f"dit={LORA};text_encoder=q_proj,v_proj"}


def run(model: Path, base: Path, output: Path, **changes: Any) -> TrainResult:
    config = make_config(model, base, output, max_steps=STEPS, learning_rate=1e-3, **changes)
    return train_here(config)


def same_files(a: Path, b: Path) -> list[Path]:
    """The exported files, equal byte for byte in both runs."""
    files = sorted(a.glob(f"step-{STEPS}*.safetensors"))
    assert [file.name for file in files] == sorted(file.name for file in b.glob(f"step-{STEPS}*.safetensors"))
    for file in files:
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    return files


def cached(cache: Path) -> set[str]:
    return set(json.loads((cache / "manifest.json").read_text())["parameters"])


def lora_trained(file: Path) -> bool:
    return any(bool(value.any()) for key, value in load_file(file).items() if "lora_B" in key)


def test_two_loras_train_together_and_export_to_two_files(
    tiny_qwen: Path, images: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    cache = make_cache(**BOTH)
    assert cached(cache) == {"input_latents", "prompt"}
    run(tiny_qwen, cache, tmp_path / "split", **BOTH)
    run(tiny_qwen, images, tmp_path / "whole", task="sft", **BOTH)
    files = same_files(tmp_path / "split", tmp_path / "whole")
    of_text, of_dit = sorted(files, key=lambda file: "text" not in file.name)
    assert (of_text.name, of_dit.name) == (f"step-{STEPS}.text_encoder.safetensors", f"step-{STEPS}.safetensors")
    assert all(key.startswith("text_encoder.") for key in load_file(of_text)) and lora_trained(of_text)
    assert all(key.startswith("diffusion_model.") for key in load_file(of_dit)) and lora_trained(of_dit)
    # Both files are a start for the next run.
    start = {"lora_checkpoint": f"{of_text},{of_dit}"}
    plan = RunPlan.resolve(make_config(tiny_qwen, cache, tmp_path / "next", **BOTH, **start))
    module, _ = build_module(plan, torch.device("cpu"))
    state = {key: value for file in (of_text, of_dit) for key, value in load_file(file).items()}
    found = {name: p for name, p in module.trainable().items() if "lora_B" in name}
    assert len(found) == sum("lora_B" in key for key in state)
    assert sum(float(p.detach().abs().sum()) for p in found.values()) == pytest.approx(
        sum(float(value.abs().sum()) for key, value in state.items() if "lora_B" in key), rel=1e-5
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable_models": LAYER, "lora_base_model": "dit"},
        {"lora_base_model": LAYER, "lora_target_modules": "q_proj,v_proj"},
    ],
    ids=["full", "lora"],
)
def test_a_part_of_the_text_encoder(
    tiny_qwen: Path, images: Path, make_cache: CacheMaker, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """One layer by its dotted name; the others keep their weights, and stage 2 loads the whole encoder for it."""
    cache = make_cache(**changes)
    assert cached(cache) == {"input_latents", "prompt"}
    run(tiny_qwen, cache, tmp_path / "split", **changes)
    run(tiny_qwen, images, tmp_path / "whole", task="sft", **changes)
    files = same_files(tmp_path / "split", tmp_path / "whole")
    if "trainable_models" not in changes:
        (file,) = files
        assert all(key.startswith(f"{LAYER}.") for key in load_file(file)) and lora_trained(file)
        return
    of_layer = next(file for file in files if LAYER in file.name)
    after, before = load_file(of_layer), load_file(tiny_qwen / "text_encoder" / "model.safetensors")
    for key in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
        assert not any(value.shape == after[key].shape and torch.equal(value, after[key]) for value in before.values())


def test_a_part_in_bfloat16_and_one_that_is_not_there(tiny_qwen: Path, images: Path, tmp_path: Path) -> None:
    """The trained part is in fp32 among frozen layers in bf16."""
    changes: dict[str, Any] = {"trainable_models": LAYER, "dtype": "bfloat16", "task": "sft", "batch_size": 2}
    result = run(tiny_qwen, images, tmp_path / "run", **changes)
    assert result.loss is not None and 0 < result.loss < 10
    with pytest.raises(TrainingError, match="no model 'text_encoder.model.layer' to train"):
        run(tiny_qwen, images, tmp_path / "none", **{**changes, "trainable_models": "text_encoder.model.layer"})


@pytest.fixture(scope="module")
def styled_model(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(shutil.copytree(tiny_qwen, tmp_path_factory.mktemp("styled") / "model"))
    width = json.loads((root / "transformer" / "config.json").read_text())["joint_attention_dim"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Styler(width=width).save_pretrained(root / "styler")
    return root


@pytest.fixture(scope="module")
def styled_images(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(shutil.copytree(images, tmp_path_factory.mktemp("styled") / "data"))
    head, *lines = (root / "metadata.csv").read_text().splitlines()
    rows = [f"{head},style", *(f"{line},{STYLES[number % 2]}" for number, line in enumerate(lines))]
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("trained", ["dit", "styler"])
def test_a_conditioner_of_ones_own(styled_model: Path, styled_images: Path, tmp_path: Path, trained: str) -> None:
    """Frozen, it is cached like any encoder; trained, its unit moves to stage 2 and reads the embeddings before it."""
    changes: dict[str, Any] = {"family": "tests.training.own_family", "extra_inputs": "style"}
    if trained == "styler":
        changes |= {"trainable_models": "styler", "lora_base_model": "dit"}
    plan = RunPlan.resolve(make_config(styled_model, styled_images, tmp_path, task="sft", **changes))
    data = open_data(plan)
    assert isinstance(data, DatasetSource)
    cache = write_cache(plan, data, tmp_path / "cache")
    assert cached(cache) == {"input_latents", "prompt_embeds", *(["style"] if trained == "styler" else [])}
    assert ("styler" in RunPlan.resolve(make_config(styled_model, cache, tmp_path, **changes)).models) == (
        trained == "styler"
    )
    run(styled_model, cache, tmp_path / "split", **changes)
    run(styled_model, styled_images, tmp_path / "whole", task="sft", **changes)
    files = same_files(tmp_path / "split", tmp_path / "whole")
    if trained == "styler":
        after = load_file(next(file for file in files if "styler" in file.name))["table.weight"]
        before = load_file(next((styled_model / "styler").glob("*.safetensors")))["table.weight"]
        assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), "each style was seen"


def test_what_is_said_of_each_model(tmp_path: Path) -> None:
    def config(**changes: Any) -> Any:
        return make_config(tmp_path, tmp_path, tmp_path, **changes)

    both = config(**BOTH)
    assert both.trained == both.lora_models == ("text_encoder", "dit")
    assert (both.target_modules_of("dit"), both.target_modules_of("text_encoder")) == (LORA, "q_proj,v_proj")
    assert config(lora_target_modules="re:.*=x;y").target_modules_of("dit") == "re:.*=x;y"
    only = config(lora_base_model="dit,text_encoder", lora_target_modules="text_encoder=re:(.*)[.]q_proj")
    assert (only.target_modules_of("dit"), only.target_modules_of("text_encoder")) == (None, "re:(.*)[.]q_proj")
    assert config(lora_checkpoint="a,b.safetensors").lora_checkpoints == {"dit": "a,b.safetensors"}
    with pytest.raises(ConfigError, match=r"names vae=…, which has no LoRA"):
        config(lora_target_modules="vae=conv")
    with pytest.raises(ConfigError, match="names 1 files for 2 models"):
        config(**BOTH, lora_checkpoint="a.safetensors")
    stage_1 = PreprocessConfig(model="m", dataset_base_path="d", lora_base_model="dit, text_encoder")
    assert stage_1.trained == ("dit", "text_encoder")
