"""The scale of a LoRA is what its file means: peft is the judge of its own files, others are counted by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ray_diffsynth.models.lora import add_lora, fuse_lora, load_lora_file
from ray_diffsynth.models.lora_file import LoraError, check_lora_file, lora_digest, read_lora

RANK = 4
LAYERS = ("blocks.0.to_q", "blocks.0.to_out.0", "blocks.1.to_q")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(
                [nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 8)])}) for _ in range(2)]
            )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block["to_out"][0](torch.tanh(block["to_q"](x))))  # type: ignore[index]
        return x


def tensors(prefix: str = "", down: str = "lora_A", up: str = "lora_B") -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for layer in LAYERS:
        out[f"{prefix}{layer}.{down}.weight"] = torch.ones(RANK, 8)
        out[f"{prefix}{layer}.{up}.weight"] = torch.ones(8, RANK)
    return out


def alphas(prefix: str, value: float, layers: tuple[str, ...] = LAYERS, **options: Any) -> dict[str, Tensor]:
    return {f"{prefix}{layer}.alpha": torch.tensor(value, **options) for layer in layers}


def scales(path: Path, **options: Any) -> list[float]:
    """Of LAYERS, in that order."""
    state, _ = read_lora(str(path), **options)
    return [float(state[f"{layer}.lora_B.weight"][0, 0]) for layer in LAYERS]


def write(folder: Path, state: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "l.safetensors"
    save_file(dict(state), path, metadata={"format": "pt", **(header or {})})
    return path


# ---------------------------------------------------------------- peft


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "alpha": {"lora_alpha": 12},
    "rslora": {"lora_alpha": 12, "use_rslora": True},
    "alpha pattern": {"lora_alpha": 2, "alpha_pattern": {"to_q": 12, "blocks.0.to_out.0": 1}},
    "anchored": {"lora_alpha": 2, "alpha_pattern": {r"blocks\.1\..*": 12}},
    "rank pattern": {"lora_alpha": 12, "rank_pattern": {"blocks.1.to_q": 2}},
    "all": {
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"to_out.0": 2},
        "alpha_pattern": {"blocks.1.to_q": 9, "to_q": 5},
    },
    "begun otherwise": {"lora_alpha": 12, "init_lora_weights": "gaussian"},
}


def saved_by_peft(folder: Path, config: peft.PeftConfig) -> Path:
    """What peft saves of an adapter with random weights."""
    model = peft.get_peft_model(Net(), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    model.save_pretrained(str(folder))
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_a_peft_folder_acts_as_in_peft(name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=RANK, target_modules=["to_q", "to_out.0"], **PEFT_CONFIGS[name])
    path = saved_by_peft(tmp_path, config)
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    expected = peft.PeftModel.from_pretrained(Net(), str(tmp_path))(x)
    assert (expected - Net()(x)).abs().max() > 0.05
    fused = Net()
    fuse_lora(fused, read_lora(str(path))[0])
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-5)


def test_a_dora_of_peft_acts_as_in_peft(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=RANK, lora_alpha=12, use_dora=True, target_modules=["to_q", "to_out.0"])
    path = saved_by_peft(tmp_path, config)
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    expected = peft.PeftModel.from_pretrained(Net(), str(tmp_path))(x)
    net = Net()
    info = add_lora(net, rank=RANK, alpha=1, target_modules="to_q,to_out.0", seed=0, name="dit", dora=True)
    load_lora_file(net, str(path), info)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-5)


OTHER_METHODS: dict[str, tuple[peft.PeftConfig, str]] = {
    "bias": (peft.LoraConfig(r=2, target_modules=["to_q"], bias="all"), "key .*bias"),
    "lora_bias": (peft.LoraConfig(r=2, target_modules=["to_q"], lora_bias=True), "LoRA with biases"),
    "whole layers": (
        peft.LoraConfig(r=2, target_modules=["blocks.0.to_q"], modules_to_save=["blocks.1.to_q"]),
        r"blocks\.1\.to_q\.(bias|weight) is of no known layout",
    ),
    "PiSSA": (peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "LoHa": (peft.LoHaConfig(r=2, target_modules=["to_q"]), "LoHa"),
    "LoKr": (peft.LoKrConfig(r=2, target_modules=["to_q"]), "LoKr"),
    "OFT": (peft.OFTConfig(r=2, oft_block_size=0, target_modules=["to_q"]), "OFT"),
    "IA3": (peft.IA3Config(target_modules=["to_q"], feedforward_modules=[]), r"\(IA\)3"),
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_other_methods_of_peft_are_refused_by_name(name: str, tmp_path: Path) -> None:
    config, message = OTHER_METHODS[name]
    path = saved_by_peft(tmp_path, config)
    with pytest.raises(LoraError, match=rf"adapter_model\.safetensors.*{message}"):
        read_lora(str(path))
    with pytest.raises(LoraError, match=message):
        check_lora_file(str(path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": RANK, "lora_alpha": 8, "bias": "lora_only"}, r"bias='lora_only'.*more than a LoRA"),
        ({"r": RANK, "lora_alpha": 8, "modules_to_save": ["proj_out"]}, r"modules_to_save=\['proj_out'\]"),
        ({"r": RANK, "lora_alpha": 8, "layer_replication": [[0, 2]]}, "layer_replication"),
        ({"r": RANK, "lora_alpha": 8, "peft_type": "LOHA"}, "peft_type=LOHA"),
        ({"r": 8, "lora_alpha": 8}, "rank 8 according to adapter_config.json, but its tensors have rank 4"),
        ({"r": RANK}, "adapter_config.json has no lora_alpha"),
        ({"r": RANK, "lora_alpha": None}, "the alpha of .* is None, no number"),
        ({"r": RANK, "lora_alpha": "high"}, "'high', no number"),
        ({"r": RANK, "lora_alpha": 8, "use_rslora": "maybe"}, "'maybe', neither true nor false"),
        ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {"to_k": 2}}, "alpha_pattern .* names to_k, which no layer"),
        ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {"(": 2}}, "no regular expression"),
        ([1], "holds no JSON object"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, tensors("base_model.model."))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoraError, match=rf"(?s)l\.safetensors.*{message}"):
        read_lora(str(path))


def test_a_config_that_cannot_be_read_is_refused_with_its_cause(tmp_path: Path) -> None:
    path = write(tmp_path, tensors("base_model.model."))
    for text, message in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "a Git LFS pointer"),
        ("", "empty"),
        ("{", "no JSON"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(LoraError, match=message):
            read_lora(str(path))


def test_whose_config_it_is(tmp_path: Path) -> None:
    """Of peft's names, or of the only file there; not of another LoRA that lies in the same folder."""
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": RANK, "lora_alpha": 2 * RANK, "peft_type": "LORA"}))
    alone = write(tmp_path, tensors("diffusion_model."))
    digest = lora_digest(str(alone), 8)
    assert scales(alone) == [2.0] * 3
    save_file(tensors("base_model.model."), tmp_path / "adapter_model.safetensors")
    assert scales(tmp_path / "adapter_model.safetensors") == [2.0] * 3
    assert scales(alone) == [1.0] * 3
    assert lora_digest(str(alone), 8) != digest  # what a file means decides what a run is, not its bytes alone
    assert scales(write(tmp_path, tensors("base_model.model."))) == [2.0] * 3


# ---------------------------------------------------------------- header and tensors


def adapter_metadata(prefix: str = "transformer.", **fields: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"{prefix}{name}": value for name, value in fields.items()})}


PREFIXES = ("diffusion_model.", "transformer.", "base_model.model.", "pipe.dit.", "dit.", "")
HEADERS: dict[str, tuple[dict[str, str], float]] = {
    "nothing": ({}, 1.0),
    "alpha": ({"alpha": "2", "rank": "4"}, 0.5),
    "lora_alpha": ({"lora_alpha": "8.0"}, 2.0),
    "networkalpha": ({"networkalpha": "2"}, 0.5),
    "network_alpha": ({"network_alpha": "2", "network_dim": "4"}, 0.5),
    "ss_network_alpha": ({"ss_network_alpha": "2.0", "ss_network_dim": "4"}, 0.5),
    "kohya without alpha": ({"ss_network_alpha": "None", "ss_network_dim": "4"}, 1.0),
    "rslora": ({"lora_alpha": "8", "use_rslora": "True"}, 4.0),
    "rs_lora of LyCORIS": ({"ss_network_alpha": "8", "ss_network_args": '{"rs_lora": "True"}'}, 4.0),
    "a model's name before it": ({"transformer.lora_alpha": "8", "text_encoder.lora_alpha": "1"}, 2.0),
    "diffusers": (adapter_metadata(r=4, lora_alpha=8, peft_type="LORA"), 2.0),
    "diffusers, rslora": (adapter_metadata(r=4, lora_alpha=8, use_rslora=True), 4.0),
    "diffusers, no prefix": (adapter_metadata("", r=4, lora_alpha=8), 2.0),
    "diffusers, unet": (adapter_metadata("unet.", r=4, lora_alpha=8), 2.0),
    "diffusers, pipe.dit": (adapter_metadata("pipe.dit.", r=4, lora_alpha=8), 2.0),
    "another program's JSON": ({"lora_config": json.dumps({"r": 4, "lora_alpha": 8})}, 2.0),
    "two that agree": ({"alpha": "8", **adapter_metadata(r=4, lora_alpha=8)}, 2.0),
    "other entries": ({"ss_learning_rate": "2", "modelspec.title": "alpha", "training": '{"step": 8}'}, 1.0),
}


@pytest.mark.parametrize("name", HEADERS)
def test_the_header_says_the_scale(name: str, tmp_path: Path) -> None:
    header, expected = HEADERS[name]
    for prefix in PREFIXES:
        for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_A.default", "lora_B.default")):
            path = write(tmp_path, tensors(prefix, down, up), header)
            assert scales(path) == pytest.approx([expected] * 3), prefix
            check_lora_file(str(path))


def test_tensors_say_the_scale_in_every_layout(tmp_path: Path) -> None:
    for prefix in PREFIXES:
        for side in (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")):
            for options in ({}, {"dtype": torch.bfloat16}):
                path = write(tmp_path, {**tensors(prefix, *side), **alphas(prefix, 2.0, **options)})
                assert scales(path) == [0.5] * 3
    path = write(tmp_path, {**tensors(), **alphas("", 2.0), **alphas("", 8.0, LAYERS[:1])})
    assert scales(path) == [2.0, 0.5, 0.5]


def test_layers_of_several_ranks(tmp_path: Path) -> None:
    state = tensors("diffusion_model.")
    state[f"diffusion_model.{LAYERS[2]}.lora_A.weight"] = torch.ones(2, 8)
    state[f"diffusion_model.{LAYERS[2]}.lora_B.weight"] = torch.ones(8, 2)
    assert scales(write(tmp_path, state, {"alpha": "8", "rank": "4"})) == [2.0, 2.0, 4.0]
    assert scales(write(tmp_path, state)) == [1.0, 1.0, 1.0]
    pattern = adapter_metadata(r=4, lora_alpha=8, rank_pattern={LAYERS[2]: 2}, alpha_pattern={"to_out.0": 1})
    assert scales(write(tmp_path, state, pattern)) == [2.0, 0.25, 4.0]


def test_kohyas_settings_may_differ_from_single_layers(tmp_path: Path) -> None:
    header = {"ss_network_alpha": "8", "ss_network_dim": "4", "ss_network_module": "networks.lora"}
    kohya = tensors("diffusion_model.", "lora_down", "lora_up")
    several = {**kohya, **alphas("diffusion_model.", 8.0), **alphas("diffusion_model.", 1.0, LAYERS[:1])}
    assert scales(write(tmp_path, several, header)) == [0.25, 2.0, 2.0]
    resized = {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}
    assert scales(write(tmp_path, {**kohya, **alphas("diffusion_model.", 8.0)}, resized)) == [2.0] * 3
    lycoris = {**header, "ss_network_args": '{"rs_lora": "True", "conv_alpha": "1"}'}  # alpha * sqrt(rank) in tensors
    assert scales(write(tmp_path, {**kohya, **alphas("diffusion_model.", 16.0)}, lycoris)) == [4.0] * 3


REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "header and tensors": (alphas("dit.", 2.0), {"alpha": "8"}, r"scaled by 0\.5 .* \.alpha, and by 2 .* alpha=8 in"),
    "kohya's header and tensors": (alphas("dit.", 2.0), {"ss_network_alpha": "8"}, "ss_network_alpha=8"),
    "diffusers and header": (
        {},
        {"alpha": "2", **adapter_metadata(r=4, lora_alpha=8)},
        "lora_adapter_metadata.*alpha=2",
    ),
    "diffusers and tensors": (alphas("dit.", 2.0), adapter_metadata(r=4, lora_alpha=8), "lora_adapter_metadata"),
    "two entries": ({}, {"alpha": "2", "lora_alpha": "8"}, "alpha=2 in its header.*lora_alpha=8 in its header"),
    "no number": ({}, {"alpha": "half"}, "'alpha' in its header is 'half', no number"),
    "not finite": ({}, {"lora_alpha": "nan"}, "no number"),
    "zero": ({}, {"alpha": "0"}, "is 0, with which the LoRA has no meaning"),
    "not finite tensor": (alphas("dit.", math.inf), {}, r"alpha is inf"),
    "dynamic without tensors": ({}, {"ss_network_alpha": "Dynamic"}, "'Dynamic', no number"),
    "of another rank": ({}, {"alpha": "8", "rank": "16"}, "rank=16 in its header, but its tensors have rank 4"),
    "convolutions apart": (
        {},
        {"ss_network_alpha": "8", "ss_network_args": '{"conv_alpha": "1"}'},
        "ss_network_args gives conv_alpha",
    ),
    "converted from kohya": (
        {},
        {"ss_network_alpha": "2", "ss_network_dim": "4", "ss_network_module": "networks.lora"},
        "converters differ",
    ),
    "two denoisers": (
        {},
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer_2.lora_alpha": 8})},
        "settings for transformer and transformer_2",
    ),
    "broken metadata": ({}, {"lora_adapter_metadata": "{"}, "no JSON object"),
    "an alpha alone": (alphas("dit.", 2.0, ("blocks.7.to_q",)), {}, "blocks.7.to_q has an alpha but no LoRA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused(name: str, tmp_path: Path) -> None:
    more, header, message = REFUSED[name]
    path = write(tmp_path, {**tensors("dit."), **more}, header)
    with pytest.raises(LoraError, match=rf"(?s)l\.safetensors.*{message}"):
        read_lora(str(path))
    with pytest.raises(LoraError, match=message):
        check_lora_file(str(path))


def test_each_model_of_a_file_has_its_own_settings(tmp_path: Path) -> None:
    header = json.dumps({"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 2, "text_encoder.use_rslora": True})
    state = {**tensors("transformer."), **tensors("text_encoder."), **tensors("text_encoder_2.")}
    path = write(tmp_path, state, {"lora_adapter_metadata": header})
    assert scales(path, prefix="transformer.") == [2.0] * 3
    assert scales(path, prefix="text_encoder.") == [1.0] * 3
    assert scales(path, prefix="text_encoder_2.") == [1.0] * 3  # nothing is said of it
    check_lora_file(str(path))


def test_the_scale_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, tensors("dit."), {"alpha": "2"})
    with caplog.at_level("INFO"):
        check_lora_file(str(path))
    assert [record.getMessage() for record in caplog.records] == [f"{path}: scale 0.5, by alpha=2 in its header"]


def test_the_first_of_overlapping_patterns_counts_as_in_peft(tmp_path: Path) -> None:
    patterns = {"blocks.0.to_q": RANK, "to_q": 4 * RANK, "0.to_q": RANK}
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "alpha_pattern": patterns}
    path = write(tmp_path / "a", tensors(), {"lora_adapter_metadata": json.dumps(settings)})
    assert scales(path) == [1, 2, 4]


@pytest.mark.parametrize("name", ["alpha_pattern", "rank_pattern"])
def test_patterns_that_are_no_object(name: str, tmp_path: Path) -> None:
    settings = {"r": RANK, "lora_alpha": RANK, name: ["to_q"]}
    path = write(tmp_path / "a", tensors(), {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(LoraError, match=f"{name} of .* no object"):
        read_lora(str(path))


def test_settings_that_are_nested_without_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a", tensors("base_model.model."))
    (path.parent / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(LoraError, match="adapter_config.json"):
        read_lora(str(path))
    header = {"lora_adapter_metadata": '{"a":' * 100_000}
    with pytest.raises(LoraError, match="no JSON object"):
        read_lora(str(write(tmp_path / "b", tensors(), header)))


@pytest.mark.parametrize(
    ("a", "b"), [((4, 8), (8, 3)), ((0, 8), (8, 0)), ((4,), (8,)), ((4, 8), (8,))], ids=["rank", "0", "1d", "b"]
)
def test_halves_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...], tmp_path: Path) -> None:
    state = {"x.lora_A.weight": torch.ones(a), "x.lora_B.weight": torch.ones(b)}
    with pytest.raises(LoraError, match="no rank in common"):
        read_lora(str(write(tmp_path / "a", state)))
