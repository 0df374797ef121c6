"""The LoRA from split training is the LoRA from unsplit training, bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Preprocess, train_config
from tests.training.helpers import train_here

pytestmark = pytest.mark.ray


def lora(config_output: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted(config_output.glob("*.safetensors"))[-1])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_split_equals_unsplit(
    tiny_qwen: Path, dataset: Path, fp32_cache: Path, tmp_path: Path, batch_size: int
) -> None:
    options = {"batch_size": batch_size, "num_epochs": 2}
    split = train_here(train_config(tiny_qwen, fp32_cache, tmp_path / "split", **options))
    whole = train_here(train_config(tiny_qwen, dataset, tmp_path / "whole", task="sft", **options))
    assert split.steps == whole.steps > 8 and split.loss == whole.loss
    first, second = lora(tmp_path / "split"), lora(tmp_path / "whole")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(tensor.abs().max() > 0 for name, tensor in first.items() if "lora_B" in name), "nothing was trained"


def test_batched_encoding_is_within_rounding(
    tiny_qwen: Path, dataset: Path, fp32_cache: Path, preprocess: Preprocess, tmp_path: Path
) -> None:
    preprocess(tiny_qwen, dataset, tmp_path / "batched", batch_size=4)
    for name, cache in (("single", fp32_cache), ("batched", tmp_path / "batched")):
        train_here(train_config(tiny_qwen, cache, tmp_path / name / "lora"))
    first, second = lora(tmp_path / "single" / "lora"), lora(tmp_path / "batched" / "lora")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-5)


def test_stage_2_needs_no_encoder(tiny_qwen: Path, fp32_cache: Path, tmp_path: Path) -> None:
    """With the encoders' folders gone, training gives the same LoRA."""
    bare = Path(shutil.copytree(tiny_qwen, tmp_path / "model"))
    for folder in ("text_encoder", "tokenizer", "vae"):
        shutil.rmtree(bare / folder)
    for name, model in (("full", tiny_qwen), ("bare", bare)):
        train_here(train_config(model, fp32_cache, tmp_path / name, max_steps=3))
    first, second = lora(tmp_path / "full"), lora(tmp_path / "bare")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_the_text_encoder_moves_it_to_stage_2(
    tiny_qwen: Path, dataset: Path, preprocess: Preprocess, tmp_path: Path
) -> None:
    """A LoRA on the text encoder: the prompt is cached, its embedding is not, and split still equals unsplit."""
    lora_on_text = {"lora_base_model": "text_encoder", "lora_target_modules": "q_proj,v_proj", "max_steps": 4}
    report = preprocess(tiny_qwen, dataset, tmp_path / "cache", lora_base_model="text_encoder")
    assert set(report["parameters"]) == {"input_latents", "prompt"}
    for name, base, task in (("split", tmp_path / "cache", "sft:train"), ("whole", dataset, "sft")):
        train_here(train_config(tiny_qwen, base, tmp_path / name, task=task, **lora_on_text))
    first, second = lora(tmp_path / "split"), lora(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(tensor.abs().max() > 0 for name, tensor in first.items() if "lora_B" in name)
