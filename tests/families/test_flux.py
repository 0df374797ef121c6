"""What FLUX.1 alone has: fused target names, and the guidance embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.models.lora import match_targets
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.flux import FluxPipeline, model_fn
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.build import build_module

DOUBLE, SINGLE = "transformer_blocks.0", [f"single_transformer_blocks.{n}" for n in (0, 1)]


@pytest.fixture(scope="module")
def dit(model_folder: Callable[[str], Path]) -> Any:
    return FluxPipeline.from_pretrained(model_folder("flux"), models=["dit"], torch_dtype=torch.float32).dit


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("a_to_qkv", [f"{DOUBLE}.attn.{n}" for n in ("to_q", "to_k", "to_v")]),
        ("b_to_qkv", [f"{DOUBLE}.attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj")]),
        ("ff_b.0", [f"{DOUBLE}.ff_context.net.0.proj"]),
        ("norm1_b.linear", [f"{DOUBLE}.norm1_context.linear"]),
        ("norm.linear", [f"{block}.norm.linear" for block in SINGLE]),
        ("proj_out", [f"{block}.proj_out" for block in SINGLE]),
        (
            "to_qkv_mlp",
            [f"{block}.{n}" for block in SINGLE for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
        ),
    ],
)
def test_diffsynths_target_names_are_understood(dit: Any, name: str, layers: list[str]) -> None:
    assert set(match_targets(dit, FluxPipeline.lora_aliases[name])) == set(layers)


def test_the_default_targets_are_the_linear_layers_of_the_blocks(dit: Any) -> None:
    every = [path for path in match_targets(dit, "all-linear") if "transformer_blocks." in path]
    assert set(match_targets(dit, FluxPipeline.lora_targets)) == set(every)
    assert "proj_out" in match_targets(dit, "proj_out"), "behind the last block, so that the bare name needs an alias"


def test_a_run_trains_the_layers_that_diffsynths_names_mean(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = TrainConfig(
        task="sft",
        model=str(model_folder("flux")),
        dataset_base_path=str(tmp_path),
        output_path=str(tmp_path / "out"),
        learning_rate=1e-4,
        lora_target_modules="b_to_out, proj_out",
    )
    _, trained = build_module(RunPlan.resolve(config), torch.device("cpu"))
    (lora,) = trained.loras
    assert lora.targets == (f"{DOUBLE}.attn.to_add_out", *(f"{block}.proj_out" for block in SINGLE))


def test_guidance_is_given_to_a_transformer_that_has_it(dit: Any) -> None:
    batch: dict[str, Any] = {
        "latents": torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500.0]),
        "prompt_embeds": torch.ones(1, 3, 32),
        "pooled_prompt_embeds": torch.ones(1, 32),
    }
    config = {**dit.config, "guidance_embeds": False}
    with torch.no_grad():
        one, more = (model_fn(dit=dit, **batch, embedded_guidance=scale) for scale in (1.0, 3.5))
        schnell = FluxTransformer2DModel.from_config(config)
        assert torch.equal(model_fn(dit=schnell, **batch), model_fn(dit=schnell, **batch, embedded_guidance=3.5))
    assert (one - more).abs().max() > 1e-4
    assert FluxPipeline.skeleton().training_settings()["embedded_guidance"] == 1.0
    with pytest.raises(PipelineError, match="qwen_image has no embedded guidance; use cfg_scale"):
        QwenImagePipeline.skeleton()("p", embedded_guidance=3.5)
