"""The LoRA files that training writes load again: as a start, fused into the base, and for generating."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from ray_diffsynth.generate.lora import attach_loras
from ray_diffsynth.models.lora import LoraError, add_lora, lora_parameters, lora_state
from ray_diffsynth.pipelines.base import BasePipeline, Part
from ray_diffsynth.pipelines.lora_keys import fuse_model_lora, load_model_lora, submodule
from ray_diffsynth.training.export import Trained, export_trained

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
    (path,) = export_trained(made, Trained((info,), ()), str(tmp_path), "lora", layout=layout)

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
    (path,) = export_trained(made, Trained((info,), ()), str(tmp_path), "lora")
    with pytest.raises(LoraError, match="layers that the model does not have"):
        fuse_model_lora(Own(), "text_encoder.layers.1", path)
