"""What follows from a configuration before any weights are read: downloads, and settings that a cache decides."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.models import locate
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.data.source import SourceError
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config


def test_a_stage_downloads_its_own_models(
    tiny_qwen: Path, tmp_path: Path, make_cache: CacheMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, asked = make_cache(), list[list[str]]()

    def find(model: str, weights: list[str], **options: Any) -> Path:
        asked.append(list(weights))
        return tiny_qwen

    monkeypatch.setattr(locate, "find_repository", find)
    dit, encoders = ["transformer/*.safetensors"], ["text_encoder/*.safetensors", "vae/*.safetensors"]
    RunPlan.resolve(PreprocessConfig(model="a/b", dataset_base_path=str(tmp_path), output_path=str(tmp_path / "cache")))
    RunPlan.resolve(make_config(Path("a/b"), cache, tmp_path))
    RunPlan.resolve(make_config(Path("a/b"), cache, tmp_path, validation_prompts="a cat"))
    RunPlan.resolve(make_config(Path("a/b"), tmp_path, tmp_path, task="sft"))
    assert asked == [[], encoders, [], dit, [], ["*/*.safetensors"], [], sorted(encoders + dit)]


def test_a_cache_of_another_setting_is_refused(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(make_cache(), tmp_path / "cache"))
    manifest = json.loads((cache / "manifest.json").read_text())
    for group in manifest["groups"]:
        group["parts"] = {"setting:tiled": "true"} if group["name"] == "vae" else {}
    (cache / "manifest.json").write_text(json.dumps(manifest))
    RunPlan.resolve(make_config(tiny_qwen, cache, tmp_path))  # stage 2 does not read it: the cache decides
    RunPlan.resolve(make_config(tiny_qwen, cache, tmp_path, pipeline_settings={"tiled": True}))
    with pytest.raises(SourceError, match="was made with tiled = true, this training has false; give both the same"):
        RunPlan.resolve(make_config(tiny_qwen, cache, tmp_path, pipeline_settings={"tiled": False}))


@pytest.mark.parametrize("family", ["named_by_a_cache", "named_by_a_cache:Pipe"])
def test_a_cache_names_no_code(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Its family is compared with the model's, never imported."""
    cache = Path(shutil.copytree(make_cache(), tmp_path / "cache"))
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "family": family}))
    (tmp_path / "named_by_a_cache.py").write_text("x = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SourceError, match=f"is for family '{family}', this training for 'qwen_image'"):
        RunPlan.resolve(make_config(tiny_qwen, cache, tmp_path))
    assert "named_by_a_cache" not in sys.modules
