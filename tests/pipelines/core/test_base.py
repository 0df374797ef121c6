"""BasePipeline, with the code of DiffSynth-Studio's guides on a user's own model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ray_diffsynth.diffusion import FlowMatchScheduler, gradient_checkpoint_forward
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import MissingInputError, PipelineError
from ray_diffsynth.pipelines.core.graph import cached_parameters, split_units
from ray_diffsynth.pipelines.core.runner import run_units
from ray_diffsynth.pipelines.core.state import make_state
from ray_diffsynth.pipelines.core.unit import PipelineUnit


class ToyVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def encode(self, image: Tensor, tiled: bool, tile_size: int, tile_stride: int) -> Tensor:
        return self.gain * nn.functional.avg_pool2d(image, 8)


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)

    def forward(self, image: Tensor, temb: Tensor) -> Tensor:
        return image + torch.tanh(self.mix(image.movedim(1, -1)).movedim(-1, 1) * temb)


class ToyDiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ToyBlock(), ToyBlock()])


# From here: the guides' code as it stands, with a toy model in place of Qwen-Image's.
# ruff: noqa: E501
# fmt: off
class NewUnit_NoiseInitializer(PipelineUnit):
    def __init__(self):
        super().__init__(
            input_params=("height", "width", "seed", "rand_device"),
            output_params=("noise",),
        )

    def process(self, pipe: NewPipeline, height, width, seed, rand_device):
        noise = pipe.generate_noise((1, 3, height//8, width//8), seed=seed, rand_device=rand_device, rand_torch_dtype=pipe.torch_dtype)
        return {"noise": noise}


class NewUnit_InputImageEmbedder(PipelineUnit):
    def __init__(self):
        super().__init__(
            input_params=("input_image", "noise", "tiled", "tile_size", "tile_stride"),
            output_params=("latents", "input_latents"),
            onload_model_names=("vae",)
        )

    def process(self, pipe: NewPipeline, input_image, noise, tiled, tile_size, tile_stride):
        if input_image is None:
            return {"latents": noise, "input_latents": None}
        pipe.load_models_to_device(['vae'])
        image = pipe.preprocess_image(input_image).to(device=pipe.device, dtype=pipe.torch_dtype)
        input_latents = pipe.vae.encode(image, tiled=tiled, tile_size=tile_size, tile_stride=tile_stride)
        if pipe.scheduler.training:
            return {"latents": noise, "input_latents": input_latents}
        else:
            latents = pipe.scheduler.add_noise(input_latents, noise, timestep=pipe.scheduler.timesteps[0])
            return {"latents": latents, "input_latents": input_latents}


def model_fn_new(
    dit=None, latents=None, timestep=None, use_gradient_checkpointing=False, use_gradient_checkpointing_offload=False, **kwargs
):
    image = latents
    for block in dit.blocks:
        image = gradient_checkpoint_forward(
            block,
            use_gradient_checkpointing,
            use_gradient_checkpointing_offload,
            image=image,
            temb=timestep.reshape(-1, 1, 1, 1) / 1000,
        )
    return image


class NewPipeline(BasePipeline):
    def __init__(self, device="cpu", torch_dtype=torch.bfloat16):
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.scheduler = FlowMatchScheduler("Z-Image")
        self.dit: ToyDiT = None
        self.vae: ToyVAE = None
        self.in_iteration_models = ("dit",)
        self.units = [
            NewUnit_NoiseInitializer(),
            NewUnit_InputImageEmbedder(),
        ]
        self.model_fn = model_fn_new

# fmt: on


@pytest.fixture
def pipe() -> NewPipeline:
    torch.manual_seed(0)
    pipe = NewPipeline(torch_dtype=torch.float32)
    pipe.vae, pipe.dit = ToyVAE(), ToyDiT()
    return pipe


IMAGE = Image.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3))
INPUTS: dict[str, Any] = {"input_image": IMAGE, "height": 16, "width": 24}


def test_the_guides_units_switch_on_scheduler_training(pipe: NewPipeline) -> None:
    start = make_state(pipe.units, {**pipe.training_settings(), **INPUTS})
    pipe.scheduler.set_timesteps(1000, training=True)
    training = run_units(pipe.units, pipe, [start])[0].flat()
    assert torch.equal(training["latents"], training["noise"])
    assert training["input_latents"].shape == (1, 3, 2, 3)

    pipe.scheduler.set_timesteps(4, denoising_strength=0.5)
    sampling = run_units(pipe.units, pipe, [start])[0].flat()
    sigma = pipe.scheduler.sigmas[0]
    expected = (1 - sigma) * sampling["input_latents"] + sigma * sampling["noise"]
    torch.testing.assert_close(sampling["latents"], expected)

    text_to_image = make_state(pipe.units, {**pipe.training_settings(), **INPUTS, "input_image": None})
    assert run_units(pipe.units, pipe, [text_to_image])[0].flat()["input_latents"] is None


@pytest.mark.parametrize(("use", "offload"), [(True, False), (True, True)])
def test_the_guides_model_fn_trains_with_checkpointing(pipe: NewPipeline, use: bool, offload: bool) -> None:
    batch = {"latents": torch.randn(2, 3, 2, 3), "timestep": torch.tensor([100.0, 900.0]), "unrelated": 1}
    found = []
    for wish in ((False, False), (use, offload)):
        pipe.zero_grad()
        flags = dict(zip(("use_gradient_checkpointing", "use_gradient_checkpointing_offload"), wish, strict=True))
        pipe.predict({**batch, **flags}).square().sum().backward()
        found.append([p.grad for p in pipe.dit.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_guides_units_split(pipe: NewPipeline) -> None:
    reads = (*pipe.model_fn_params(), "input_latents")
    assert pipe.model_fn_params()[:2] == ("latents", "timestep")
    provided = ("latents", "noise", "timestep", *pipe.training_settings())
    stage1, stage2 = split_units(pipe.units, ["dit"])
    assert (stage1, stage2) == (pipe.units, [])
    assert cached_parameters(stage1, stage2, reads=reads, provided=provided, inputs=INPUTS) == ("input_latents",)
    stage1, stage2 = split_units(pipe.units, ["vae"])
    assert (stage1, stage2) == (pipe.units[:1], pipe.units[1:])
    assert cached_parameters(stage1, stage2, reads=reads, provided=provided, inputs=list(INPUTS)) == (
        "noise",
        "input_image",
    )


def test_a_model_that_is_not_loaded_is_named(pipe: NewPipeline) -> None:
    pipe.vae = None
    with pytest.raises(PipelineError, match="'vae' is not loaded, but NewUnit_InputImageEmbedder needs it"):
        run_units(pipe.units, pipe, [make_state(pipe.units, {**pipe.training_settings(), **INPUTS})])
    pipe.dit = None
    with pytest.raises(PipelineError, match="'dit' is not loaded, but model_fn needs it"):
        pipe.predict({"latents": torch.zeros(1)})


def test_predict_names_a_missing_parameter(pipe: NewPipeline) -> None:
    pipe.model_fn = lambda *, dit, latents, prompt_embeds: latents
    with pytest.raises(MissingInputError, match="model_fn needs 'prompt_embeds'"):
        pipe.predict({"latents": torch.zeros(1)})


def test_preprocess_image() -> None:
    pipe = NewPipeline(torch_dtype=torch.float32)
    pixels = pipe.preprocess_image(IMAGE)
    assert pixels.shape == (1, 3, 16, 24)
    assert pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(pipe.preprocess_image(np.array(IMAGE)), pixels)
    assert pipe.preprocess_image(IMAGE.convert("L"), torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert pipe.vae_output_to_image(pixels).tobytes() == IMAGE.tobytes()
    # Bit for bit DiffSynth-Studio's formula, all values of a byte, in every dtype and range.
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)[::-1]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for low, high in ((-1.0, 1.0), (0.0, 1.0)):
            plain = torch.as_tensor(every.copy()).float() * ((high - low) / 255) + low
            expected = plain.permute(2, 0, 1)[None].contiguous().to(dtype)
            found = pipe.preprocess_image(every.copy(), torch_dtype=dtype, min_value=low, max_value=high)
            assert torch.equal(found, expected) and found.is_contiguous()
    with pytest.raises(PipelineError, match=r"uint8 pixels \(height, width, 3\), not torch.float32"):
        pipe.preprocess_image(np.zeros((3, 4, 4), dtype=np.float32))


def test_generate_noise_follows_the_seed() -> None:
    pipe = NewPipeline(torch_dtype=torch.float32)
    expected = torch.randn(1, 4, generator=torch.Generator().manual_seed(5))
    state = torch.random.get_rng_state()
    assert torch.equal(pipe.generate_noise((1, 4), seed=5), expected)
    assert not torch.equal(pipe.generate_noise((1, 4)), pipe.generate_noise((1, 4)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sizes_are_checked_and_not_rounded() -> None:
    pipe = BasePipeline(time_division_factor=4, time_division_remainder=1)
    assert pipe.check_resize_height_width(64, 32) == (64, 32)
    assert pipe.check_resize_height_width(64, 32, 9) == (64, 32, 9)
    with pytest.raises(PipelineError, match="width=40 is not a multiple of 16; use 32 or 48"):
        pipe.check_resize_height_width(64, 40)
    with pytest.raises(PipelineError, match="height=1 is not a multiple of 16; use 16"):
        pipe.check_resize_height_width(1, 16)
    with pytest.raises(PipelineError, match="num_frames=8 is not a multiple of 4 plus 1; use 5 or 9"):
        pipe.check_resize_height_width(16, 16, 8)


class Padded(BasePipeline):
    padded_params = {"prompt_embeds": "prompt_embeds_mask"}


def test_collate_joins_pads_and_keeps_settings() -> None:
    samples = [
        {"z": torch.zeros(1, 2), "prompt_embeds": torch.ones(1, n, 3), "prompt": "p", "cfg_scale": 1.0, "image": None}
        for n in (2, 4)
    ]
    batch = Padded().collate(samples)
    assert batch["z"].shape == (2, 2) and batch["prompt"] == ["p", "p"] and batch["cfg_scale"] == 1.0
    assert batch["image"] is None
    assert batch["prompt_embeds"].shape == (2, 4, 3) and batch["prompt_embeds"][0, 2:].abs().sum() == 0
    assert batch["prompt_embeds_mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert Padded().collate(samples[:1])["prompt_embeds_mask"] is None


def test_collate_names_what_does_not_fit() -> None:
    with pytest.raises(PipelineError, match=r"'z' has differing shapes in one batch: \[\(2,\), \(3,\)\]"):
        BasePipeline().collate([{"z": torch.zeros(1, 2)}, {"z": torch.zeros(1, 3)}])
    with pytest.raises(PipelineError, match=r"samples \[1\] of the batch lack the parameter 'z'"):
        BasePipeline().collate([{"z": torch.zeros(1, 2)}, {}])
    with pytest.raises(PipelineError, match="the setting 'cfg_scale' differs"):
        BasePipeline().collate([{"cfg_scale": 1.0}, {"cfg_scale": 2.0}])


def test_to_remembers_device_and_dtype(pipe: NewPipeline) -> None:
    assert pipe.to("cpu", dtype=torch.float64).torch_dtype == torch.float64
    assert pipe.vae.gain.dtype == torch.float64 and pipe.device == torch.device("cpu")
