"""What Z-Image alone has: the layout of its text encoder, batches as lists, fp32 sampling; and the VAE's tiling."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen3ForCausalLM

from ray_diffsynth.data.warnings import DataWarning, collecting
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.z_image import ZImagePipeline
from tests.families.cases import PROMPTS, make_image


@pytest.fixture(scope="module")
def pipe(model_folder: Callable[[str], Path]) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(model_folder("z_image"), torch_dtype=torch.float32)


def test_the_text_encoder_may_be_stored_with_its_head(
    pipe: ZImagePipeline, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """As in the published repository: the keys start with `model.`."""
    root = Path(shutil.copytree(model_folder("z_image"), tmp_path / "model"))
    shutil.rmtree(root / "text_encoder")
    whole = Qwen3ForCausalLM(pipe.text_encoder.config)
    whole.model.load_state_dict(pipe.text_encoder.state_dict())
    whole.save_pretrained(root / "text_encoder")
    other = ZImagePipeline.from_pretrained(root, models=["text_encoder"], torch_dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(other.encode_prompts(PROMPTS)[1], pipe.encode_prompts(PROMPTS)[1])


def test_prompts_are_left_alone_and_cut_aloud(pipe: ZImagePipeline) -> None:
    prompts = list(PROMPTS)
    with torch.no_grad(), collecting() as said:
        whole = pipe.encode_prompts(prompts)
        assert prompts == list(PROMPTS) and not said
        cut = pipe.encode_prompts(prompts, max_sequence_length=whole[1].shape[1] - 2)
    length = cut[1].shape[1]
    assert list(said) == [DataWarning("caption_cut", prompts[1], f"{length + 2} tokens cut to {length}")]
    torch.testing.assert_close(cut[1], whole[1][:, :-2])


def test_a_batch_is_a_list(pipe: ZImagePipeline) -> None:
    samples = [{"prompt_embeds": torch.zeros(1, length, 16), "cfg_scale": 1.0} for length in (3, 5)]
    batch = pipe.collate(samples)
    assert [tuple(value.shape) for value in batch["prompt_embeds"]] == [(1, 3, 16), (1, 5, 16)]
    assert batch["cfg_scale"] == 1.0
    with pytest.raises(PipelineError, match="lack the parameter 'prompt_embeds'"):
        pipe.collate([samples[0], {"cfg_scale": 1.0}])


def test_sampling_is_in_fp32_whatever_the_model(pipe: ZImagePipeline) -> None:
    half = ZImagePipeline(torch_dtype=torch.bfloat16)
    assert half.initial_noise((1, 4, 4, 4), 0).dtype == torch.float32
    assert torch.equal(half.initial_noise((1, 4, 4, 4), 0), pipe.initial_noise((1, 4, 4, 4), 0))


def test_image_to_image_and_tiling(pipe: ZImagePipeline) -> None:
    image = make_image(64, 64)
    sizes = {"height": 64, "width": 64, "seed": 0, "num_inference_steps": 2}
    made = pipe("p", input_image=image, denoising_strength=0.2, tiled=True, tile_size=4, tile_stride=3, **sizes)
    assert isinstance(made, Image.Image) and made.size == (64, 64)
    pixels = pipe.preprocess_image(image)
    before = {name: getattr(pipe.vae, name) for name in ("use_tiling", "tile_latent_min_size", "tile_overlap_factor")}
    with torch.no_grad():
        whole = pipe.encode_images(pixels, tiled=False, tile_size=128, tile_stride=64)
        wide = pipe.encode_images(pixels, tiled=True, tile_size=8, tile_stride=6)
        tiled = pipe.encode_images(pixels, tiled=True, tile_size=4, tile_stride=3)
    assert torch.equal(whole, wide) and tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert before == {name: getattr(pipe.vae, name) for name in before}
