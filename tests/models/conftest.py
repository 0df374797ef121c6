from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

MakeModel = Callable[[Path], Path]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def make_model() -> MakeModel:
    """Writes the files of a Qwen-Image repository, with text in place of weights, into a folder."""

    def make(root: Path) -> Path:
        index = {"_class_name": "QwenImagePipeline"}
        for part, (library, cls) in {
            "transformer": ("diffusers", "QwenImageTransformer2DModel"),
            "vae": ("diffusers", "AutoencoderKLQwenImage"),
            "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
            "tokenizer": ("transformers", "Qwen2Tokenizer"),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        }.items():
            index[part] = [library, cls]  # type: ignore[assignment]
        write(root / "model_index.json", json.dumps(index))
        write(root / "transformer/config.json", json.dumps({"_class_name": "QwenImageTransformer2DModel"}))
        shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        write(
            root / "transformer/diffusion_pytorch_model.safetensors.index.json",
            json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}),
        )
        for shard in shards:
            write(root / "transformer" / shard, f"weights {shard}")
        write(root / "vae/config.json", json.dumps({"_class_name": "AutoencoderKLQwenImage"}))
        write(root / "vae/diffusion_pytorch_model.safetensors", "vae weights")
        write(root / "text_encoder/config.json", json.dumps({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}))
        write(root / "text_encoder/model.safetensors", "text encoder weights")
        write(root / "tokenizer/tokenizer_config.json", "{}")
        write(root / "scheduler/scheduler_config.json", "{}")
        return root

    return make


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees this machine's models, caches or network; returns the folder of the Hugging Face cache."""
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("DIFFSYNTH_MODEL_BASE_PATH", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return hub
