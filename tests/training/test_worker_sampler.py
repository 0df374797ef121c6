"""The workers draw between steps, where no GPU is left for an actor; what is trained stays as it is, bit for bit."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_diffsynth.pipelines.core import on_demand
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ray_diffsynth.training.ray import job, sampler
from ray_diffsynth.training.report.metrics_log import read_metrics
from tests.cuda_autocast import CudaAutocast
from tests.training.conftest import CacheMaker
from tests.training.helpers import Runs, make_config, train_here

DRAWN: dict[str, Any] = {
    "validation_prompts": "a red circle|a blue square|a cat",
    "sample_steps": 2,
    "sample_inference_steps": 2,
    "height": 64,
    "width": 64,
}


def run(model: Path, base: Path, output: Path, **options: Any) -> None:
    train_here(make_config(model, base, output, max_steps=4, **options))


def grids(output: Path) -> dict[str, Image.Image]:
    return {path.name: Image.open(path).copy() for path in sorted((output / "samples").iterdir())}


def assert_same_run(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    first, second = (
        [(line["loss"], line["grad_norm"], line.get("validation_loss")) for line in read_metrics(str(each))]
        for each in (one, other)
    )
    assert first == second


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16", "lora_dropout": 0.3, "use_gradient_checkpointing": True},
        {"task": "sft", "lora_base_model": "dit,text_encoder", "lora_target_modules": "text_encoder=q_proj"},
        {"trainable_models": "dit", "dtype": "bfloat16"},
    ],
    ids=["fp32", "dropout-bf16", "unsplit-text-encoder", "full"],
)
def test_a_run_with_images_trains_what_the_run_without_does(
    tiny_qwen: Path, images: Path, make_cache: CacheMaker, tmp_path: Path, options: dict[str, Any]
) -> None:
    size = {"height": 64, "width": 64}
    base = images if "task" in options else make_cache(**{k: v for k, v in options.items() if k == "dtype"})
    options = {"save_steps": 2, "validation_samples": 2, "log_with": "none", **options}
    run(tiny_qwen, base, tmp_path / "plain", **options, **size)
    run(tiny_qwen, base, tmp_path / "drawn", **{**options, **DRAWN})
    assert_same_run(tmp_path / "plain", tmp_path / "drawn")
    drawn = grids(tmp_path / "drawn")
    assert list(drawn) == ["step-00000000.png", "step-00000002.png", "step-00000004.png"]
    assert len({sheet.tobytes() for sheet in drawn.values()}) == 3
    assert {sheet.size for sheet in drawn.values()} == {(128, 128)}


def test_step_0_is_the_base_model_and_encoders_are_read_once(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    load = on_demand.load_part

    def counted(source: Any, subfolder: str, *arguments: Any, **options: Any) -> Any:
        read[subfolder] += 1
        return load(source, subfolder, *arguments, **options)

    monkeypatch.setattr(on_demand, "load_part", counted)
    run(tiny_qwen, make_cache(), tmp_path, **DRAWN)
    assert read == {"text_encoder": 1, "vae": 3}
    pipe = QwenImagePipeline.from_pretrained(tiny_qwen, torch_dtype=torch.float32)
    plain: Any = pipe("a blue square", seed=1, height=64, width=64, num_inference_steps=2)
    sheet = grids(tmp_path)["step-00000000.png"]
    assert np.array_equal(np.asarray(sheet.crop((64, 0, 128, 64))), np.asarray(plain))


def test_encoder_and_decoder_run_outside_autocast(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found_in: dict[str, set[bool]] = {}
    load = on_demand.load_part

    def watched(source: Any, subfolder: str, *arguments: Any, **options: Any) -> Any:
        model = load(source, subfolder, *arguments, **options)
        found = found_in.setdefault(subfolder, set())
        for layer in model.modules():
            layer.register_forward_pre_hook(lambda module, args: found.add(torch.is_autocast_enabled("cpu")))
        return model

    monkeypatch.setattr(on_demand, "load_part", watched)
    with CudaAutocast():
        run(tiny_qwen, make_cache(dtype="bfloat16"), tmp_path, dtype="bfloat16", **DRAWN)
    assert found_in == {"text_encoder": {False}, "vae": {False}}


def test_a_failure_ends_only_the_images(
    tiny_qwen: Path,
    make_cache: CacheMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no picture today")

    monkeypatch.setattr(QwenImagePipeline, "decode_latents", fail)
    with caplog.at_level(logging.WARNING):
        run(tiny_qwen, make_cache(), tmp_path / "drawn", save_steps=2, **DRAWN)
    assert caplog.text.count("the sample images ended early: step 0: RuntimeError: no picture today") == 1
    assert not (tmp_path / "drawn/samples").exists()
    run(tiny_qwen, make_cache(), tmp_path / "plain", save_steps=2, height=64, width=64)
    assert_same_run(tmp_path / "drawn", tmp_path / "plain")


def test_a_run_that_goes_on_draws_its_own_steps_alone(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    config = make_config(tiny_qwen, make_cache(), tmp_path, **DRAWN, save_steps=1, max_steps=2)
    train_here(config)
    (tmp_path / "samples/step-00000000.png").unlink()
    run(tiny_qwen, make_cache(), tmp_path, **DRAWN, save_steps=1)
    assert list(grids(tmp_path)) == ["step-00000002.png", "step-00000004.png"]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_workers_share_the_prompts(runs: Runs, tmp_path: Path, shard: bool) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "shard_base": shard, "log_with": "none"}
    assert runs(tmp_path / "drawn", workers=2, **options, **DRAWN) == [0, 0], runs.messages()[-2000:]
    assert runs(tmp_path / "plain", workers=2, **options, height=64, width=64) == [0, 0]
    assert_same_run(tmp_path / "drawn", tmp_path / "plain")
    assert list(grids(tmp_path / "drawn")) == ["step-00000000.png", "step-00000002.png", "step-00000004.png"]
    assert runs(tmp_path / "alone", workers=1, **{**options, "max_steps": 1}, **DRAWN) == [0]
    assert grids(tmp_path / "alone")["step-00000000.png"].tobytes() == (
        grids(tmp_path / "drawn")["step-00000000.png"].tobytes()
    )


@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_ray_draw_where_no_gpu_is_left(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    monkeypatch.setattr(sampler, "sampler_process", lambda *_: None)
    options: dict[str, Any] = {"max_steps": 2, "num_workers": 1, "resources": {"CPU": 1}}
    job.run(make_config(tiny_qwen, make_cache(), tmp_path / "out", **options, **DRAWN))
    assert list(grids(tmp_path / "out")) == ["step-00000000.png", "step-00000002.png"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [grid["title"] for grid in report["samples"]] == ["Base model", "Step 2"]
