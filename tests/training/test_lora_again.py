"""The LoRA files that training writes load again: as a start, fused into the base, and for generating."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ray_diffsynth.generate.lora import attach_loras
from ray_diffsynth.models.lora import LoraError, add_lora, lora_parameters, lora_state
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.lora_keys import fuse_model_lora, load_model_lora, submodule
from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.training.export import Trained, trained_files

MODELS = ("dit", "text_encoder", "text_encoder_2", "image_encoder", "conditioner")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4)}) for _ in "ab"])


class Own(BasePipeline):
    """All the kinds of models that families have, the denoising one with names of its own in files."""

    parts: ClassVar[Mapping[str, Part]] = {
        name: Part("transformer" if name == "dit" else name, "diffusers:X") for name in MODELS
    }
    lora_prefix = "diffusion_model."

    def __init__(self) -> None:
        super().__init__(torch_dtype=torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name in MODELS:
                setattr(self, name, Layers())

    def original_lora_key(self, key: str) -> str:
        return key.replace("layers.", "blocks.").replace("to_q", "q")


@pytest.mark.parametrize("layout", ["family", "diffusers"])
@pytest.mark.parametrize("model", [*MODELS, "text_encoder.layers.1", "dit.layers.0"])
def test_an_export_loads_again(model: str, layout: str, tmp_path: Path) -> None:
    made, targets = Own(), "to_q"
    info = add_lora(submodule(made, model), rank=2, alpha=6, target_modules=targets, seed=1, name=model)
    for parameter in lora_parameters(submodule(made, model)).values():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    (file,) = trained_files(made, Trained((info,), ()), str(tmp_path), "lora", layout=layout)
    file.write()
    path = file.path

    again = Own()
    same = add_lora(submodule(again, model), rank=2, alpha=6, target_modules=targets, seed=9, name=model)
    load_model_lora(again, model, path, same)
    for (name, value), (_, other) in zip(
        lora_state(submodule(made, model)).items(), lora_state(submodule(again, model)).items(), strict=True
    ):
        torch.testing.assert_close(value, other, msg=name)

    fused, attached, x = Own(), Own(), torch.ones(1, 4)
    fuse_model_lora(fused, model, path)
    attach_loras(attached, [path])
    layer = "layers.1.to_q" if model.count(".") == 0 else "to_q"
    expected = submodule(made, model).get_submodule(layer)(x)
    assert not torch.allclose(expected, submodule(Own(), model).get_submodule(layer)(x), atol=1e-2)
    for pipe in (fused, attached):
        torch.testing.assert_close(submodule(pipe, model).get_submodule(layer)(x), expected)


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    made: Any = Own()
    info = add_lora(made.text_encoder, rank=2, alpha=2, target_modules="to_q", seed=1, name="text_encoder")
    (file,) = trained_files(made, Trained((info,), ()), str(tmp_path), "lora")
    file.write()
    path = file.path
    with pytest.raises(LoraError, match="layers that the model does not have"):
        fuse_model_lora(Own(), "text_encoder.layers.1", path)


@pytest.mark.parametrize("place", ["adapter_config.json", "header", "tensors"])
def test_every_way_in_reads_the_alpha_of_others(place: str, tmp_path: Path) -> None:
    """As a start, fused into the base, and for generating: a LoRA of rank 2 and alpha 6 acts at three times B·A."""
    generator = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator)
    prefix = "base_model.model." if place == "adapter_config.json" else "transformer."
    state = {f"{prefix}layers.1.to_q.lora_A.weight": down, f"{prefix}layers.1.to_q.lora_B.weight": up}
    if place == "tensors":
        state[f"{prefix}layers.1.to_q.alpha"] = torch.tensor(6.0)
    path = str(tmp_path / "theirs.safetensors")
    save_file(state, path, metadata={"alpha": "6"} if place == "header" else None)
    if place == "adapter_config.json":
        (tmp_path / place).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))

    x = torch.ones(1, 4)
    layer = Own().dit.layers[1]["to_q"]
    expected = layer(x) + 3 * x @ down.T @ up.T
    started, fused, attached = Own(), Own(), Own()
    info = add_lora(started.dit, rank=2, alpha=1, target_modules="layers.1.to_q", seed=9, name="dit")
    load_model_lora(started, "dit", path, info)
    fuse_model_lora(fused, "dit", path)
    attach_loras(attached, [path])
    for pipe in (started, fused, attached):
        torch.testing.assert_close(pipe.dit.layers[1]["to_q"](x), expected)
