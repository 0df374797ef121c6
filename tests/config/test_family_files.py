"""configs/: a file for each family, which both jobs accept, with figures of memory that follow from its formula."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ray_diffsynth.config import PreprocessConfig, TrainConfig
from ray_diffsynth.config.flags import parse
from ray_diffsynth.models.lora import match_targets
from ray_diffsynth.pipelines.registry import FAMILIES, get_pipeline_class
from ray_diffsynth.training.quantize import castable_bytes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GPUS = (24, 48, 80)
"""GB of the GPUs that the files speak of; a run shall take at most three quarters of one."""


class Architecture(NamedTuple):
    """A published model, as its config.json has it; what is not given is the default of the class."""

    transformer: tuple[str, dict[str, Any]]
    blocks: int
    width: int
    text_tokens: int
    """In the blocks' own inputs; 0 where the text is one input that all blocks share."""
    encoder: str
    """The largest model of stage 1."""
    images: int = 1
    """Images in the blocks' inputs: the one that is trained on, and one that is edited."""


QWEN: tuple[str, dict[str, Any]] = ("QwenImageTransformer2DModel", {})
WAN_SMALL = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
WAN_I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
# Qwen2.5-VL makes a token of 28 x 28 pixels.
ARCHITECTURES = {
    "qwen_image": Architecture(QWEN, 60, 3072, 512, "qwen2_5_vl_7b"),
    "qwen_image_edit": Architecture(QWEN, 60, 3072, 512 + 1024**2 // 28**2, "qwen2_5_vl_7b", images=2),
    "qwen_image_edit_plus": Architecture(QWEN, 60, 3072, 512 + 384**2 // 28**2, "qwen2_5_vl_7b", images=2),
    "flux": Architecture(("FluxTransformer2DModel", {"guidance_embeds": True}), 19 + 38, 3072, 512, "t5_xxl"),
    "flux2": Architecture(("Flux2Transformer2DModel", {**KLEIN, "guidance_embeds": False}), 25, 3072, 512, "qwen3_4b"),
    # Two more refiner blocks see the image, and two others the text.
    "z_image": Architecture(("ZImageTransformer2DModel", {}), 30 + 2, 3840, 512, "qwen3_4b"),
    "wan": Architecture(("WanTransformer3DModel", WAN_SMALL), 30, 1536, 0, "umt5_xxl"),
    "wan_i2v": Architecture(("WanTransformer3DModel", WAN_I2V), 40, 5120, 0, "umt5_xxl"),
}


@functools.cache
def parameters_of_encoder(name: str) -> int:
    """Of a text encoder, made without memory."""
    import transformers as t

    t5: dict[str, Any] = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64}
    t5 |= {"feed_forward_proj": "gated-gelu"}
    qwen3 = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
    qwen3 |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    text = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    make: dict[str, Callable[[], torch.nn.Module]] = {
        "t5_xxl": lambda: t.T5EncoderModel(t.T5Config(vocab_size=32128, **t5)),
        "umt5_xxl": lambda: t.UMT5EncoderModel(t.UMT5Config(vocab_size=256384, **t5)),
        "qwen3_4b": lambda: t.Qwen3Model(t.Qwen3Config(**qwen3)),
        "qwen2_5_vl_7b": lambda: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        ),
    }
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make[name]().parameters())


@functools.cache
def transformer(family: str) -> torch.nn.Module:
    """The frozen transformer of the published model, in bfloat16, made without memory."""
    import diffusers

    name, arguments = ARCHITECTURES[family].transformer
    with torch.device("meta"):
        model: torch.nn.Module = getattr(diffusers, name)(**arguments)
    return model.to(torch.bfloat16).requires_grad_(False)


def lora_parameters(family: str, config: TrainConfig) -> int:
    model = transformer(family)
    layers = [model.get_submodule(path) for path in match_targets(model, config.lora_target_modules, name="dit")]
    return sum((config.lora_rank or 0) * (int(layer.in_features) + int(layer.out_features)) for layer in layers)


def image_tokens(config: TrainConfig) -> int:
    """A token is 16 x 16 pixels, of a video in 4 frames but for the first."""
    pixels = config.max_pixels if config.height is None else config.height * (config.width or 0)
    return ((config.num_frames or 1) - 1) // 4 * (pixels // 256) + pixels // 256


def smallest_gpu(gigabytes: float) -> int:
    return next(size for size in GPUS if gigabytes <= 0.75 * size)


def figures(family: str, config: TrainConfig) -> list[str]:
    """What the file's comment says of memory."""
    model, known = transformer(family), ARCHITECTURES[family]
    base = sum(parameter.numel() for parameter in model.parameters())
    lora = lora_parameters(family, config)
    tokens = known.images * image_tokens(config) + known.text_tokens
    kept = known.blocks * tokens * known.width * 2
    total = base * 2 + lora * 16 + kept
    eight_bits = total - castable_bytes(model)
    encoder = parameters_of_encoder(known.encoder)
    return [
        f"frozen weights: {base / 1e9:.2f} billion parameters x 2 bytes = {base * 2 / 1e9:.1f} GB",
        f"LoRA: {lora / 1e6:.1f} million parameters x 16 bytes = {lora * 16 / 1e9:.1f} GB",
        f"kept activations: {known.blocks} blocks x {tokens} tokens x {known.width} x 2 bytes = {kept / 1e9:.1f} GB",
        f"sum: {total / 1e9:.1f} GB, for a GPU of {smallest_gpu(total / 1e9)} GB",
        f"with fp8_base: {eight_bits / 1e9:.1f} GB, for a GPU of {smallest_gpu(eight_bits / 1e9)} GB",
        f"stage 1: {encoder / 1e9:.2f} billion parameters of the text encoder x 2 bytes = {encoder * 2 / 1e9:.1f} GB",
    ]


def load(family: str) -> tuple[PreprocessConfig, TrainConfig]:
    """The file as both jobs read it."""
    given = ["--config", str(CONFIGS / f"{family}.yaml"), "--dataset_base_path", "data", "--output_path", "/tmp/out"]
    return parse(PreprocessConfig, given, prog="preprocess"), parse(TrainConfig, given, prog="train")


def test_every_family_has_a_file() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(FAMILIES) == set(ARCHITECTURES)
    listed = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert [family for family in FAMILIES if f"({family}.yaml)" not in listed] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_both_jobs_accept_the_file(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess, train = load(family)
    assert preprocess.model == train.model and "/" in str(train.model)
    assert (train.learning_rate, train.lora_rank, train.use_gradient_checkpointing) == (1e-4, 32, True)
    noted = re.findall(r"note: --(\w+) has no effect here: (.*)", capsys.readouterr().err)
    for name, reason in noted:  # an option of the other job, or one that the cache decides
        assert re.search("it belongs to|the cache holds", reason), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_fits_the_family(family: str) -> None:
    preprocess, train = load(family)
    pipe = get_pipeline_class(family).skeleton()
    assert train.lora_target_modules == ",".join(pipe.lora_targets)
    side = math.isqrt(preprocess.max_pixels)
    height, width = (side, side) if preprocess.height is None else (preprocess.height, preprocess.width)
    sizes = (height, width, preprocess.num_frames) if family.startswith("wan") else (height, width)
    assert pipe.check_resize_height_width(*sizes) == sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_figures_follow_from_the_formula(family: str) -> None:
    text = (CONFIGS / f"{family}.yaml").read_text(encoding="utf-8")
    _, train = load(family)
    found = figures(family, train)
    assert [line for line in found if f"#   {line}\n" not in text] == []
    assert train.fp8_base is False  # its rule: only where the sum does not fit the largest GPU
