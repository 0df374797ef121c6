"""Our Qwen-Image against diffusers' own pipeline, on a tiny random model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_diffsynth.data.warnings import DESCRIPTIONS, DataWarning, collecting
from ray_diffsynth.models.locate import locate_model
from ray_diffsynth.pipelines.core.errors import MissingInputError, PipelineError
from ray_diffsynth.pipelines.core.graph import cached_parameters, group_units, split_units
from ray_diffsynth.pipelines.core.runner import run_units
from ray_diffsynth.pipelines.core.state import UnitState, make_state
from ray_diffsynth.pipelines.qwen_image.model import model_fn
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ray_diffsynth.pipelines.registry import family_of, get_pipeline_class
from ray_diffsynth.pipelines.shared.packing import pack_latents, unpack_latents

PROMPTS = ["a red square", "a small blue circle on a white table, oil painting", ""]


def make_image(height: int = 32, width: int = 48, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pipe(tiny_qwen: Path) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(tiny_qwen, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def diffusers_pipe(tiny_qwen: Path) -> Any:
    import diffusers

    return diffusers.QwenImagePipeline.from_pretrained(str(tiny_qwen), dtype=torch.float32)


@pytest.fixture
def training(pipe: QwenImagePipeline) -> QwenImagePipeline:
    pipe.scheduler.set_timesteps(training=True)
    return pipe


def encode(pipe: QwenImagePipeline, images: list[Image.Image], prompts: list[str]) -> list[dict[str, Any]]:
    settings = pipe.training_settings()
    states = [
        make_state(pipe.units, {**settings, "input_image": image, "prompt": prompt})
        for image, prompt in zip(images, prompts, strict=True)
    ]
    return [state.flat() for state in run_units(pipe.units, pipe, states)]


@pytest.mark.parametrize(("cfg_scale", "negative", "steps"), [(1.0, "", 3), (4.0, "ugly, blurred", 3), (2.5, "", 2)])
def test_latents_equal_those_of_diffusers(
    pipe: QwenImagePipeline, diffusers_pipe: Any, cfg_scale: float, negative: str, steps: int
) -> None:
    common: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": steps, "output_type": "latent"}
    theirs = diffusers_pipe(
        prompt=PROMPTS[1], negative_prompt=negative, true_cfg_scale=cfg_scale,
        generator=torch.Generator().manual_seed(7), **common,
    ).images  # fmt: skip
    ours = pipe(PROMPTS[1], negative, cfg_scale=cfg_scale, seed=7, **common)
    assert ours.shape == (1, 16, 4, 6)
    torch.testing.assert_close(pack_latents(ours), theirs, rtol=0, atol=1e-4)


def test_images_equal_those_of_diffusers(pipe: QwenImagePipeline, diffusers_pipe: Any) -> None:
    common: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2}
    theirs = diffusers_pipe(
        prompt=PROMPTS[0], true_cfg_scale=1.0, generator=torch.Generator().manual_seed(1), **common
    ).images[0]
    ours = pipe(PROMPTS[0], cfg_scale=1, seed=1, **common)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_image_to_image_keeps_more_of_the_image_with_less_strength(pipe: QwenImagePipeline) -> None:
    pipe.scheduler.set_timesteps(2)
    clean = encode_one(pipe, make_image())
    common: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 2, "cfg_scale": 1, "seed": 0}
    far = [
        float(
            (pipe("p", input_image=make_image(), denoising_strength=s, output_type="latent", **common) - clean).norm()
        )
        for s in (0.2, 1.0)
    ]
    assert far[0] < far[1]
    with pytest.raises(PipelineError, match="input_image is 16x16"):
        pipe("p", input_image=make_image(16, 16), **common)


def encode_one(pipe: QwenImagePipeline, image: Image.Image) -> torch.Tensor:
    pixels = pipe.preprocess_image(image)
    with torch.no_grad():
        return pipe.encode_images(pixels, tiled=False, tile_size=128, tile_stride=64)


def test_call_refuses_what_it_cannot_make(pipe: QwenImagePipeline) -> None:
    with pytest.raises(PipelineError, match="height=40 is not a multiple of 16; use 32 or 48"):
        pipe("p", height=40, width=32)
    with pytest.raises(PipelineError, match="output_type='np'"):
        pipe("p", height=32, width=32, output_type="np")


def test_training_units_encode_and_draw_no_noise(training: QwenImagePipeline, diffusers_pipe: Any) -> None:
    with torch.no_grad():
        (sample,) = encode(training, [make_image()], [PROMPTS[1]])
        embeds, mask = diffusers_pipe.encode_prompt(PROMPTS[1])
    assert mask is None and torch.equal(sample["prompt_embeds"], embeds)
    assert sample["input_latents"].shape == (1, 16, 4, 6)
    assert (sample["height"], sample["width"]) == (32, 48)
    assert "noise" not in sample and "latents" not in sample
    vae = training.vae
    z = vae.encode(training.preprocess_image(make_image())[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(sample["input_latents"], (z - mean) / std)
    decoded = training.decode_latents(sample["input_latents"], tiled=False, tile_size=128, tile_stride=64)
    torch.testing.assert_close(decoded, vae.decode(z[:, :, None]).sample[:, :, 0], rtol=1e-4, atol=1e-5)


def test_encoding_in_batches_equals_one_by_one(training: QwenImagePipeline) -> None:
    images, prompts = [make_image(32, 48, 1), make_image(32, 32, 2), make_image(32, 48, 3)], PROMPTS
    with torch.no_grad():
        together = encode(training, images, prompts)
        apart = [encode(training, [image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a["input_latents"], b["input_latents"], rtol=0, atol=1e-5)
        torch.testing.assert_close(a["prompt_embeds"], b["prompt_embeds"], rtol=0, atol=1e-5)
        # Nothing that is kept holds on to the storage of the batch.
        for name in ("input_latents", "prompt_embeds"):
            assert a[name].untyped_storage().nbytes() == a[name].numel() * a[name].element_size()


def test_a_padded_batch_predicts_as_its_samples_do(training: QwenImagePipeline) -> None:
    with torch.no_grad():
        samples = encode(training, [make_image(seed=i) for i in range(3)], PROMPTS)
        kept = [{name: sample[name] for name in ("input_latents", "prompt_embeds")} for sample in samples]
        times = torch.tensor([900.0, 500.0, 100.0])
        batch = training.collate(kept)
        assert batch["prompt_embeds_mask"].sum(1).tolist() == [sample["prompt_embeds"].shape[1] for sample in samples]
        together = training.predict({**batch, "latents": batch["input_latents"], "timestep": times})
        for i, sample in enumerate(kept):
            single = training.collate([sample])
            assert single["prompt_embeds_mask"] is None
            alone = training.predict({**single, "latents": single["input_latents"], "timestep": times[i : i + 1]})
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_long_prompts_are_cut_and_said_so(training: QwenImagePipeline, caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        whole, cut = (training.encode_prompts([PROMPTS[1]], max_sequence_length=n)[0] for n in (512, 4))
        assert torch.equal(cut, whole[:, :4])
        (said,) = [record.message for record in caplog.records]
        assert f"{DESCRIPTIONS['caption_cut']}: 1 (" in said and "tokens cut to 4)" in said
        caplog.clear()
        exact = training.encode_prompts([PROMPTS[1]], max_sequence_length=whole.shape[1])[0]
    assert torch.equal(exact, whole) and not caplog.records


def test_a_limit_above_diffusers_1024_is_kept_and_its_cuts_are_counted(training: QwenImagePipeline) -> None:
    """Its own encoding stops at 1024 tokens without a word, whatever more is asked for."""
    words = "red " * 1100
    with torch.no_grad(), collecting() as said:
        cut, whole = (training.encode_prompts([words], max_sequence_length=n)[0] for n in (1024, 4096))
    assert cut.shape[1] == 1024 < whole.shape[1]
    assert list(said) == [DataWarning("caption_cut", words, f"{whole.shape[1]} tokens cut to 1024")]


def test_tiling_is_for_one_call(training: QwenImagePipeline) -> None:
    with torch.no_grad():
        pixels = training.preprocess_image(make_image(64, 64))
        whole = training.encode_images(pixels, tiled=False, tile_size=128, tile_stride=64)
        wide = training.encode_images(pixels, tiled=True, tile_size=8, tile_stride=4)
        tiled = training.encode_images(pixels, tiled=True, tile_size=4, tile_stride=2)
    assert torch.equal(whole, wide)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert not training.vae.use_tiling and training.vae.tile_sample_min_height == 256


def test_only_latents_and_embeddings_are_cached(tiny_qwen: Path) -> None:
    pipe = QwenImagePipeline.skeleton()
    assert pipe.dit is None and not list(pipe.parameters())
    stage1, stage2 = split_units(pipe.units, ["dit"])
    written = {name for unit in stage1 for name in unit.fetch_output_params()}
    provided = ["latents", "noise", "timestep", *pipe.collate_outputs]
    provided += [name for name in pipe.training_settings() if name not in written]
    reads = (*pipe.model_fn_params(), "input_latents")
    inputs = ("input_image", "prompt", "height", "width")
    cached = cached_parameters(stage1, stage2, reads=reads, provided=provided, inputs=inputs)
    assert (stage2, cached) == ([], ("input_latents", "prompt_embeds"))
    groups = group_units(stage1, cached)
    assert [(group.name, group.parameters, len(group.units)) for group in groups] == [
        ("vae", ("input_latents",), 1),
        ("text_encoder", ("prompt_embeds",), 1),
    ]
    stage1, stage2 = split_units(pipe.units, ["dit", "text_encoder.model.layers.1"])
    assert [type(unit).__name__ for unit in stage2] == ["ImageUnit_PromptEmbedder"]
    cached = cached_parameters(stage1, stage2, reads=reads, provided=provided, inputs=inputs)
    assert cached == ("input_latents", "prompt")


def test_a_gradient_reaches_a_text_encoder_that_is_trained(tiny_qwen: Path) -> None:
    pipe = QwenImagePipeline.from_pretrained(tiny_qwen, models=["text_encoder"], torch_dtype=torch.float32)
    pipe.text_encoder.requires_grad_(True)
    (embeds,) = pipe.encode_prompts([PROMPTS[0]])
    embeds.square().sum().backward()
    assert pipe.text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointing_gives_equal_gradients(tiny_qwen: Path, offload: bool) -> None:
    pipe = QwenImagePipeline.from_pretrained(tiny_qwen, models=["dit"], torch_dtype=torch.float32)
    pipe.dit.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    width = pipe.dit.config.joint_attention_dim
    batch = {
        "latents": torch.randn(1, 16, 4, 4, generator=generator),
        "timestep": torch.tensor([300.0]),
        "prompt_embeds": torch.randn(1, 5, width, generator=generator),
    }
    found = []
    for use in (False, True):
        pipe.zero_grad()
        flags = {"use_gradient_checkpointing": use, "use_gradient_checkpointing_offload": use and offload}
        pipe.predict({**batch, **flags}).square().mean().backward()
        found.append([p.grad for p in pipe.dit.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_only_the_models_asked_for_are_read(tiny_qwen: Path, tmp_path: Path) -> None:
    root = tmp_path / "only_transformer"
    shutil.copytree(tiny_qwen, root, ignore=shutil.ignore_patterns("text_encoder", "vae", "tokenizer"))
    pipe = QwenImagePipeline.from_pretrained(root, models=["dit.transformer_blocks.0"], torch_dtype=torch.bfloat16)
    assert pipe.dit is not None and pipe.vae is None and pipe.text_encoder is None
    assert pipe.dit.dtype == torch.bfloat16 and not any(p.requires_grad for p in pipe.parameters())
    assert not pipe.dit.training
    with pytest.raises(PipelineError, match=r"the vae is needed.*vae/\*.safetensors"):
        QwenImagePipeline.from_pretrained(root, models=["vae"])
    with pytest.raises(PipelineError, match=r"no model 'unet'; it has text_encoder, vae, dit"):
        QwenImagePipeline.from_pretrained(root, models=["unet"])


def test_parts_named_by_patterns(tiny_qwen: Path) -> None:
    patterns = f"{tiny_qwen}:text_encoder/model*.safetensors,{tiny_qwen}:vae/diffusion_pytorch_model.safetensors"
    pipe = QwenImagePipeline.from_pretrained(locate_model(None, model_id_with_origin_paths=patterns))
    assert pipe.dit is None and pipe.vae is not None and pipe.tokenizer is not None
    with pytest.raises(PipelineError, match="the dit is needed"):
        QwenImagePipeline.from_pretrained(
            locate_model(None, model_id_with_origin_paths=patterns), models=["dit"], torch_dtype=torch.float32
        )


def test_an_image_is_needed_in_training(training: QwenImagePipeline) -> None:
    state = UnitState({**training.training_settings(), "height": 32, "width": 32}, {"prompt": "p"})
    with pytest.raises(MissingInputError, match=r"ImageUnit_ImageEncoder needs 'input_image'.*metadata column"):
        run_units(training.units, training, [state])
    with pytest.raises(MissingInputError, match="ImageUnit_ShapeChecker needs 'height'"):
        run_units(training.units, training, [UnitState(training.training_settings(), {"prompt": "p"})])


def test_the_registry_knows_the_family(tiny_qwen: Path) -> None:
    assert get_pipeline_class(family_of(tiny_qwen)) is QwenImagePipeline


def test_packing_is_inverted_and_model_fn_takes_no_unknown_names() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    assert torch.equal(unpack_latents(pack_latents(latents), 4, 6), latents)
    with pytest.raises(TypeError, match="unknown"):
        model_fn(dit=None, latents=latents, timestep=latents, prompt_embeds=latents, unknown=1)  # type: ignore[call-arg]
