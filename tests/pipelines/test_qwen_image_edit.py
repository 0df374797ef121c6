"""Qwen-Image-Edit beyond the conformance suite: sizes of the images, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from ray_diffsynth.pipelines import qwen_image_edit as edit
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.runner import run_units
from ray_diffsynth.pipelines.core.state import make_state
from ray_diffsynth.pipelines.qwen_image_edit import QwenImageEditPipeline, scaled_size
from ray_diffsynth.pipelines.qwen_image_edit_plus import QwenImageEditPlusPipeline
from tests.families.cases import make_image
from tests.families.tiny.qwen_image_edit_plus import build


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> QwenImageEditPlusPipeline:
    root = build(tmp_path_factory.mktemp("edit") / "model")
    return QwenImageEditPlusPipeline.from_pretrained(root, torch_dtype=torch.float32)


@pytest.mark.parametrize("size", [(1024, 1024), (1328, 800), (333, 1777), (64, 48)])
@pytest.mark.parametrize("area", [1024 * 1024, 384 * 384])
def test_images_are_scaled_as_diffusers_does(size: tuple[int, int], area: int) -> None:
    width, height = size
    ratio = width / height
    side = (area * ratio) ** 0.5
    assert scaled_size(Image.new("RGB", size), area) == (round(side / 32) * 32, round(side / ratio / 32) * 32)


def test_an_image_of_any_size_is_scaled_on_the_way_in(
    pipe: QwenImageEditPlusPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit, "EDIT_AREA", 64 * 64)
    arguments: dict[str, Any] = {"prompt": "a red square", "cfg_scale": 1.0, "seed": 0, "num_inference_steps": 2}
    result = pipe(**arguments, edit_image=make_image(50, 99))
    assert isinstance(result, Image.Image) and result.size == (96, 32)
    with pytest.raises(PipelineError, match="height=50 is not a multiple of 16"):
        pipe(**arguments, edit_image=make_image(50, 99), edit_image_auto_resize=False)


def test_the_prompt_and_each_image_change_the_result(pipe: QwenImageEditPlusPipeline) -> None:
    def latents(prompt: str = "a red square", first: int = 0, second: int = 1) -> torch.Tensor:
        edit = [make_image(32, 48, seed=first), make_image(32, 48, seed=second)]
        options: dict[str, Any] = {"edit_image_auto_resize": False, "height": 32, "width": 48, "output_type": "latent"}
        made = pipe(prompt, edit, cfg_scale=1.0, seed=0, num_inference_steps=2, **options)
        assert isinstance(made, torch.Tensor)
        return made

    base = latents()
    assert torch.equal(base, latents())
    for other in (latents(prompt="a blue circle"), latents(first=2), latents(second=2)):
        assert (other - base).abs().max() > 1e-4


def test_errors_say_what_to_do(pipe: QwenImageEditPlusPipeline) -> None:
    one = QwenImageEditPipeline()
    with pytest.raises(PipelineError, match="holds 2 images.*qwen_image_edit_plus"):
        one.images([make_image(), make_image()])
    with pytest.raises(PipelineError, match="holds 0 images"):
        pipe.images([])
    with pytest.raises(PipelineError, match="stands for an image"):
        pipe.encode_edit_prompt("a <|image_pad|>", [make_image()])


def test_images_of_several_sizes(pipe: QwenImageEditPlusPipeline) -> None:
    """Each keeps its own; a batch of them is its samples one by one."""

    def sample(seed: int) -> dict[str, Any]:
        edit = [make_image(32, 48, seed=seed), make_image(64, 16, seed=seed + 1)]
        inputs = {"input_image": make_image(32, 32, seed=seed), "edit_image": edit, "prompt": "both", "height": 32}
        inputs |= {"width": 32, **pipe.training_settings()}
        (state,) = run_units(pipe.units, pipe, [make_state(pipe.units, inputs)])
        return state.flat()

    samples = [sample(1), sample(5)]
    first, second = samples[0]["edit_latents"]
    assert first.shape[-2:] == (4, 6) and second.shape[-2:] == (8, 2)
    batch = pipe.collate(samples)

    def predicted(batch: dict[str, Any]) -> torch.Tensor:
        latents = batch["input_latents"]
        return pipe.predict({**batch, "latents": latents, "timestep": torch.full((len(latents),), 500.0)})

    with torch.no_grad():
        whole = predicted(batch)
        for index, one in enumerate(samples):
            assert torch.allclose(whole[index], predicted(pipe.collate([one]))[0], atol=1e-5)
    turned = [{**one, "edit_latents": one["edit_latents"][::-1]} for one in samples]
    with torch.no_grad():
        assert (predicted(pipe.collate(turned)) - whole).abs().max() > 1e-5
