from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_diffsynth.models.load import load_companion, load_part
from ray_diffsynth.models.locate import ModelFolderError, ModelSource, locate_model

DIT = "diffusers:QwenImageTransformer2DModel"
VAE = "diffusers:AutoencoderKLQwenImage"
TEXT = "transformers:Qwen2_5_VLForConditionalGeneration"


def load(source: ModelSource, part: str, cls: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load_part(source, part, cls, torch_dtype=dtype, device="cpu")


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture
def copy(tiny_qwen: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_qwen, tmp_path / "copy")


def test_parts_equal_those_of_diffusers(tiny_qwen: Path) -> None:
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(str(tiny_qwen))
    source = locate_model(str(tiny_qwen))
    for part, cls, module in (
        ("transformer", DIT, pipe.transformer),
        ("vae", VAE, pipe.vae),
        ("text_encoder", TEXT, pipe.text_encoder),
    ):
        ours = load(source, part, cls)
        assert equal(ours, module)
        assert not ours.training
        assert not any(p.requires_grad for p in ours.parameters())
    ours_tokenizer = load_companion(source, "tokenizer", "transformers:AutoTokenizer")
    assert ours_tokenizer("a red square").input_ids == pipe.tokenizer("a red square").input_ids
    scheduler = load_companion(source, "scheduler", "diffusers:FlowMatchEulerDiscreteScheduler")
    assert scheduler.config.shift_terminal == pipe.scheduler.config.shift_terminal


@pytest.mark.parametrize(("part", "cls"), [("transformer", DIT), ("text_encoder", TEXT)])
def test_dtype(part: str, cls: str, tiny_qwen: Path) -> None:
    module = load(locate_model(str(tiny_qwen)), part, cls, torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_only_the_parts_own_folder_is_read(copy: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(copy / part)
    (copy / "model_index.json").unlink()
    load(locate_model(None, model_id_with_origin_paths=f"{copy}:transformer/*.safetensors"), "transformer", DIT)


@pytest.mark.parametrize("names", [["x.safetensors"], ["b-2.safetensors", "a-1.safetensors"]])
@pytest.mark.parametrize(("part", "cls"), [("transformer", DIT), ("text_encoder", TEXT)])
def test_files_under_other_names(names: list[str], part: str, cls: str, copy: Path, tiny_qwen: Path) -> None:
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    for number, name in enumerate(names):
        some = {k: v for i, (k, v) in enumerate(tensors.items()) if i % len(names) == number}
        save_file(some, copy / part / name, metadata={"format": "pt"})
    expected = load(locate_model(str(tiny_qwen)), part, cls)
    assert equal(load(locate_model(str(copy)), part, cls), expected)
    paths = json.dumps([[str(copy / part / name) for name in names]])
    assert equal(load(locate_model(None, model_paths=paths), part, cls), expected)


def test_weights_that_lack_a_tensor(copy: Path) -> None:
    file = copy / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["img_in.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"lack 1 tensors.*img_in\.weight"):
        load(locate_model(str(copy)), "transformer", DIT)
    encoder = copy / "text_encoder/model.safetensors"
    tensors = load_file(encoder)
    name = next(k for k in tensors if "q_proj.weight" in k)
    del tensors[name]
    save_file(tensors, encoder, metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match="lack 1 tensors"):
        load(locate_model(str(copy)), "text_encoder", TEXT)


def test_damaged_weights_name_the_folder(copy: Path) -> None:
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelFolderError, match=str(copy / "vae")):
        load(locate_model(str(copy)), "vae", VAE)


def test_another_class_than_the_family_wants(tiny_qwen: Path) -> None:
    with pytest.raises(ModelFolderError, match="holds a AutoencoderKLQwenImage, but vae must be a AutoencoderKL;"):
        load(locate_model(str(tiny_qwen)), "vae", "diffusers:AutoencoderKL")


def test_no_config_and_no_folder(copy: Path) -> None:
    source = locate_model(str(copy))
    (copy / "vae/config.json").unlink()
    with pytest.raises(ModelFolderError, match="has no config.json"):
        load(source, "vae", VAE)
    with pytest.raises(ModelFolderError, match="does not exist"):
        load(source, "image_encoder", VAE)


def test_a_class_that_does_not_exist(tiny_qwen: Path) -> None:
    source = locate_model(str(tiny_qwen))
    for cls in ("QwenImageTransformer2DModel", "peft:LoraConfig", "diffusers:NoSuchClass"):
        with pytest.raises(ValueError, match="class"):
            load(source, "vae", cls)
