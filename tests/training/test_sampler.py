"""Sample pictures, without the actor: the grid of a step's weights, as PNG and in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from ray_diffsynth.training.sampler import Sampler, grid, read_prompts
from ray_diffsynth.training.setup import TrainingError
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config


def test_prompts_from_a_file_and_from_the_option(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == read_prompts("a cat | a dog") == ["a cat", "a dog"]
    with pytest.raises(TrainingError, match="has no prompt"):
        read_prompts(" | ")


def test_pictures_follow_the_weights(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    config = make_config(tiny_qwen, make_cache(), tmp_path, height=64, width=64, sample_inference_steps=2)
    sampler = Sampler(config, ["a cat", "a dog"], torch.device("cpu"))
    names = [name for name in dict(sampler.module.named_parameters()) if "lora_B" in name]
    weights = {name: torch.zeros_like(sampler.module.get_parameter(name)) for name in names}
    first, again = (Path(sampler.draw(step, weights)).read_bytes() for step in (1, 2))
    other = Path(sampler.draw(3, {name: value + 0.5 for name, value in weights.items()}))
    assert first == again != other.read_bytes()
    assert other == tmp_path / "samples/step-00000003.png" and Image.open(other).size == (128, 64)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_grid_has_a_place_for_each() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = grid([Image.new("RGB", (4, 6), colour) for colour in colours])
    assert sheet.size == (8, 12)
    assert [sheet.getpixel(at) for at in ((1, 1), (5, 1), (1, 7))] == colours
