"""A file that a download left in place of a model's: one line with the cause and the fix, before anything is loaded."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from ray_diffsynth.models.folder import ModelFolderError, read_json_object
from ray_diffsynth.models.hub import find_repository
from ray_diffsynth.models.integrity import check_companion, check_safetensors
from ray_diffsynth.models.load import load_companion, load_part
from ray_diffsynth.models.locate import locate_model
from ray_diffsynth.pipelines.registry import FamilyError, family_of, get_pipeline_class

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 253806278\n"
WHOLE = save({"a": torch.zeros(4, 4), "b": torch.ones(3, dtype=torch.bfloat16)}, metadata={"format": "pt"})


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer)
    return buffer.getvalue()


def with_header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


DAMAGED = {
    "pointer": (POINTER, "is a Git LFS pointer.*git lfs pull"),
    "page": (b"<!DOCTYPE html>\n<html><title>Sign in</title>", "is a web page.*download it again"),
    "empty": (b"", r"is empty \(0 bytes\).*download it again"),
    "zeros": (bytes(100), "is nothing but zeros"),
    "text": (b"Entry not found", "is text that begins with 'Entry not found'"),
    "pickle": (pickled(), "is a pickle by its content"),
    "cut": (WHOLE[:-5], rf"is cut off: {len(WHOLE) - 5} bytes instead of {len(WHOLE)}; download it again"),
    "cut in its header": (WHOLE[:40], "is cut off within its header"),
    "short": (WHOLE[:5], "is no safetensors file"),
    "longer": (WHOLE + b"x", "has bytes behind its end"),
    "no JSON": (with_header(b"{'a': 1}  "), r"is no safetensors file \(a damaged header"),
    "odd": (with_header(b'{"a": [1]}'), r"is no safetensors file \(a damaged header"),
    "odd, a list": (with_header(b"[1, 2]    "), r"is no safetensors file \(a damaged header"),
    "other": (b"GGUF\x03\x00\x00\x00" + bytes(range(256)), "is no safetensors file"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_weights_are_told(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelFolderError, match=rf"model\.safetensors {message}"):
        check_safetensors(file)


def test_good_weights_pass(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for content in (WHOLE, save({})):
        file.write_bytes(content)
        check_safetensors(file)
    with pytest.raises(ModelFolderError, match="cannot be read"):
        check_safetensors(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("name", ["pointer", "page", "empty"])
def test_configs_are_told(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    (tmp_path / "model_index.json").write_bytes(content)
    with pytest.raises(ModelFolderError, match=message):
        read_json_object(tmp_path / "model_index.json")
    with pytest.raises(FamilyError, match=message):
        family_of(tmp_path)


PLACES = {
    "vae/diffusion_pytorch_model.safetensors": ("pointer", "page", "cut", "empty", "pickle"),
    "vae/config.json": ("pointer", "page", "empty"),
    "tokenizer/tokenizer.json": ("pointer", "page", "empty"),
    "scheduler/scheduler_config.json": ("pointer", "empty"),
    "model_index.json": ("pointer", "empty"),
}


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in PLACES.items() for name in names])
def test_a_pipeline_names_the_file(place: str, name: str, tiny_qwen: Path, tmp_path: Path) -> None:
    """On the driver, where nothing is loaded, and in whoever loads."""
    content, message = DAMAGED[name]
    root = shutil.copytree(tiny_qwen, tmp_path / "model")
    (root / place).unlink()  # it may be a link
    (root / place).write_bytes(content)
    source = locate_model(str(root))

    def on_the_driver() -> None:
        family_of(root)
        cls = get_pipeline_class("qwen_image")
        cls.configured(source).check_files(source, cls.parts)

    with pytest.raises((ModelFolderError, FamilyError), match=rf"{Path(place).name} {message}"):
        on_the_driver()
    if place.startswith("vae/"):
        with pytest.raises(ModelFolderError, match=message):
            load_part(source, "vae", "diffusers:AutoencoderKLQwenImage", torch_dtype=torch.float32, device="cpu")
    if place.startswith("tokenizer/"):
        with pytest.raises(ModelFolderError, match=message):
            load_companion(source, "tokenizer", "transformers:Qwen2Tokenizer")


def test_a_good_model_passes(tiny_qwen: Path) -> None:
    source, cls = locate_model(str(tiny_qwen)), get_pipeline_class("qwen_image")
    cls.configured(source).check_files(source, cls.parts)


def test_a_sentencepiece_model_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "tokenizer/spiece.model").write_bytes(b"\n\x0e\n\x05<pad>\x15\x00")
    (tmp_path / "tokenizer/merges.txt").write_bytes(b"")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text("{}")
    source = locate_model(str(tmp_path))
    check_companion(source, "tokenizer")
    (tmp_path / "tokenizer/spiece.model").write_bytes(POINTER)
    with pytest.raises(ModelFolderError, match=r"spiece\.model is a Git LFS pointer"):
        check_companion(source, "tokenizer")


# ---------------------------------------------------------------- what libraries raise


def hub_errors() -> list[Exception]:
    from huggingface_hub import errors

    return [
        errors.XetDownloadError("interrupted"),
        errors.HTTPError("reset by peer"),
        errors.CorruptedCacheException("two revisions"),
        RuntimeError("a proxy"),
        TimeoutError("slow"),
    ]


@pytest.mark.parametrize("error", hub_errors(), ids=lambda error: type(error).__name__)
def test_whatever_the_hub_raises_the_places_are_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelFolderError, match=rf"'owner/name' was not found.*{type(error).__name__}: {error}"):
        find_repository("owner/name", [], complete=lambda _: True)


def test_names_that_are_no_paths(tmp_path: Path) -> None:
    for model in ("~no_such_user_here/model", "/" + "x" * 5000):
        with pytest.raises(ModelFolderError, match="cannot be looked up as a path"):
            locate_model(model)
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(pickled())
    with pytest.raises(ModelFolderError, match="is a pickle, which is not read"):
        locate_model(str(pickle))
    with pytest.raises(ModelFolderError, match="is no pattern of files"):
        locate_model(None, model_id_with_origin_paths=f"{tmp_path}:**vae")
    with pytest.raises(ModelFolderError, match="--model_paths"):
        locate_model(None, model_paths=json.dumps(["~no_such_user_here/a.safetensors"]))


def test_a_class_that_its_library_cannot_import(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    class Broken:
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            raise RuntimeError("Failed to import diffusers.models\noperator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "diffusers", Broken())
    with pytest.raises(ModelFolderError, match="AutoencoderKL cannot be imported from diffusers: operator torchvision"):
        source = locate_model(str(tiny_qwen))
        load_part(source, "vae", "diffusers:AutoencoderKL", torch_dtype=torch.float32, device="cpu")
    assert diffusers.__version__
