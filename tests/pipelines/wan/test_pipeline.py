"""Wan beyond the conformance suite: its configuration, its LoRA names in both sizes, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_diffsynth.data.warnings import DataWarning, collecting
from ray_diffsynth.models.lora import match_targets
from ray_diffsynth.pipelines.core.errors import MissingInputError, PipelineError
from ray_diffsynth.pipelines.core.runner import run_units
from ray_diffsynth.pipelines.core.state import UnitState
from ray_diffsynth.pipelines.registry import family_of
from ray_diffsynth.pipelines.wan import pipeline as wan
from ray_diffsynth.pipelines.wan.model import TEXT_TOKENS, model_fn
from ray_diffsynth.pipelines.wan.pipeline import WanPipeline
from ray_diffsynth.pipelines.wan_i2v import WanImageToVideoPipeline
from tests.families.tiny.wan import build

SIZE = {"height": 32, "width": 48, "num_frames": 5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wan") / "model")


@pytest.fixture(scope="module")
def pipe(root: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(root, torch_dtype=torch.float32)


def edited(root: Path, folder: Path, file: str, **values: Any) -> Path:
    """A copy of the model's configuration files with one changed; no weights."""
    shutil.copytree(root, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_the_models_own_shift_is_sampled(root: Path, tmp_path: Path) -> None:
    """Wan's folders hold UniPC, whose flow_shift diffusers' Euler scheduler does not know."""
    unipc = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    other = edited(root, tmp_path / "model", "scheduler/scheduler_config.json", **unipc)
    pipe = WanPipeline.from_pretrained(other, models=[])
    pipe.scheduler.set_timesteps(4)
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(pipe.scheduler.sigmas, 3 * even / (1 + 2 * even))
    pipe.scheduler.set_timesteps(4, training=True)
    torch.testing.assert_close(pipe.scheduler.sigmas, 5 * even / (1 + 4 * even))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"boundary_ratio": 0.9}, "Wan 2.2"),
        ("model_index.json", {"expand_timesteps": True}, "Wan 2.2"),
        ("transformer/config.json", {"in_channels": 36}, "takes 36 channels.*--family wan_i2v"),
    ],
)
def test_other_kinds_of_wan_are_refused(
    root: Path, tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        WanPipeline.from_pretrained(edited(root, tmp_path / "model", file, **values), models=[])


def test_a_folder_without_index_is_wan(root: Path, tmp_path: Path) -> None:
    other = edited(root, tmp_path / "model", "model_index.json")
    (other / "model_index.json").unlink()
    assert family_of(other) == "wan"


@pytest.mark.parametrize(
    ("layers", "heads", "ffn", "image_dim"),
    [(30, 12, 8960, None), (40, 40, 13824, None), (40, 40, 13824, 1280)],
    ids=["T2V 1.3B", "T2V 14B", "I2V 14B"],
)
def test_lora_names_of_the_real_layouts(layers: int, heads: int, ffn: int, image_dim: int | None) -> None:
    """Every linear layer of the real models has a name of Wan's own, which diffusers' loader turns back."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

    image = {} if image_dim is None else {"image_dim": image_dim, "added_kv_proj_dim": heads * 128, "in_channels": 36}
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=layers, num_attention_heads=heads, ffn_dim=ffn, **image)
    pipe = WanPipeline()
    assert len(match_targets(model, list(pipe.lora_targets))) == 10 * layers
    own = [f"{target}.lora_{side}.weight" for target in match_targets(model, "all-linear") for side in "AB"]
    file = {f"diffusion_model.{pipe.original_lora_key(key)}": torch.zeros(()) for key in own}
    assert not any("attn1" in key or "to_q" in key or "condition_embedder" in key for key in file)
    back = _convert_non_diffusers_wan_lora_to_diffusers(file)
    assert {key.removeprefix("transformer.") for key in back} == set(own)


def test_diffsynths_targets() -> None:
    aliases = WanPipeline.lora_aliases
    assert tuple(aliases[name] for name in ("q", "k", "v", "o", "ffn.0", "ffn.2")) == WanPipeline.lora_targets


def test_the_text_is_512_tokens_whatever_its_length(pipe: WanPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def dit(**inputs: Any) -> tuple[torch.Tensor]:
        seen.append(inputs["encoder_hidden_states"])
        return (inputs["hidden_states"],)

    short, long = (torch.ones(1, length, 8) for length in (3, TEXT_TOKENS))
    for text in (short, long):
        model_fn(dit=dit, latents=torch.zeros(1, 16, 2, 4, 4), timestep=torch.ones(1), prompt_embeds=text)
    assert all(text.shape == (1, 512, 8) for text in seen)
    assert seen[0][0, :3].eq(1).all() and seen[0][0, 3:].eq(0).all()


def test_a_long_prompt_is_cut_and_said(pipe: WanPipeline) -> None:
    text = "red square " * 600
    tokens = len(pipe.tokenizer(text.strip()).input_ids)
    with torch.no_grad(), collecting() as said:
        (embeds,) = pipe.encode_prompts([text])
    assert embeds.shape[1] == 512 < tokens
    assert list(said) == [DataWarning("caption_cut", text, f"{tokens} tokens cut to 512")]


def test_prompts_are_not_cleaned_by_half(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wan.clean_prompt("a  &amp;  b\n") == "a & b"
    monkeypatch.setattr(wan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PipelineError, match="pip install ftfy"):
        wan.clean_prompt("a")


def test_video_to_video_starts_from_the_video(pipe: WanPipeline) -> None:
    frames = [Image.fromarray(frame) for frame in np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)]
    arguments: dict[str, Any] = {
        "prompt": "a red square",
        "cfg_scale": 1.0,
        "seed": 1,
        "num_inference_steps": 2,
        **SIZE,
    }
    clean = pipe.encode_video(pipe.preprocess_video(frames), tiled=False, tile_size=34, tile_stride=18)
    near, far = (
        pipe(**arguments, input_video=frames, denoising_strength=strength, output_type="latent")
        for strength in (0.01, 1.0)
    )
    assert isinstance(near, torch.Tensor) and isinstance(far, torch.Tensor)
    assert (near - clean).abs().mean() < 0.2 * (far - clean).abs().mean()
    tiled = pipe.encode_video(pipe.preprocess_video(frames), tiled=True, tile_size=2, tile_stride=1)
    assert tiled.shape == clean.shape and not torch.equal(tiled, clean) and not pipe.vae.use_tiling


def test_errors_say_what_to_do(pipe: WanPipeline) -> None:
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    common: dict[str, Any] = {"prompt": "a", "num_inference_steps": 1}
    with pytest.raises(PipelineError, match="num_frames=4 is not a multiple of 4 plus 1; use 1 or 5"):
        pipe(**common, **{**SIZE, "num_frames": 4})
    with pytest.raises(PipelineError, match="input_video is .*'width': 32.*cut the video first"):
        pipe(**common, **SIZE, input_video=frames)
    with pytest.raises(PipelineError, match="--family wan_i2v"):
        pipe(**common, **SIZE, input_image=Image.new("RGB", (48, 32)))
    with pytest.raises(PipelineError, match="output_type"):
        pipe(**common, **SIZE, output_type="mp4")
    with pytest.raises(PipelineError, match="no frames"):
        pipe.preprocess_video([])
    of_images = WanImageToVideoPipeline()
    with pytest.raises(MissingInputError, match="WanVideoUnit_ImageEmbedderVAE needs 'input_image'"):
        run_units([of_images.units[-2]], of_images, [UnitState(dict(SIZE))])
