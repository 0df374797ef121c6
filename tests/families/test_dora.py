"""A DoRA's file loads in diffusers whatever the family, and acts there as it did in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.models.lora import lora_parameters
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.build import build_module
from ray_diffsynth.training.export import trained_files


def test_a_dora_loads_and_acts_in_diffusers(root: Path, theirs: Any, tmp_path: Path) -> None:
    config = TrainConfig(
        task="sft",
        model=str(root),
        dataset_base_path=str(tmp_path),
        output_path=str(tmp_path / "out"),
        dtype="float32",
        lora_rank=4,
        lora_alpha=2.0,
        use_dora=True,
    )
    module, trained = build_module(RunPlan.resolve(config), torch.device("cpu"))
    (info,) = trained.loras
    dit: nn.Module = module.pipe.dit
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in lora_parameters(dit).items():
            if not key.endswith("lora_A.weight"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    (file,) = trained_files(module.pipe, trained, str(tmp_path), "step-1", layout=config.lora_format)
    file.write()

    plain = {name: theirs.transformer.get_submodule(name) for name in info.targets}
    theirs.load_lora_weights(file.path)
    assert theirs.get_active_adapters()
    with torch.no_grad():
        for name, layer in plain.items():
            x = torch.randn(2, 3, layer.in_features, generator=generator)
            found = theirs.transformer.get_submodule(name)(x)
            torch.testing.assert_close(found, dit.get_submodule(name)(x), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(found, layer(x), atol=1e-3)
    theirs.unload_lora_weights()
