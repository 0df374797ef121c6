"""Videos through both stages with a tiny Wan: buckets of size and frames, the exact split, and what is reused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cache.reader import CacheReader
from tests.e2e.conftest import Preprocess, train_config
from tests.families.tiny.wan import build
from tests.training.helpers import train_here
from tests.video_files import draw_clip

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips, one of them short, a picture, and a file that is no video."""
    root = tmp_path_factory.mktemp("clips")
    for index, name in enumerate(("a.mp4", "b.mov", "c.gif")):
        draw_clip(root / name, 10 + index, height=32, width=48)
    draw_clip(root / "short.webm", 7, height=32, width=48)
    (root / "bad.mp4").write_bytes(b"no video" * 100)
    captions = ("a red square", "a red square", "a small blue circle", "a square", "nothing")
    names = ("a.mp4", "b.mov", "c.gif", "short.webm", "bad.mp4")
    rows = [f"{name},{caption}" for name, caption in zip(names, captions, strict=True)]
    (root / "metadata.csv").write_text("video,prompt\n" + "\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture(scope="module")
def encode(preprocess: Preprocess, tiny_wan: Path, clips: Path) -> Callable[..., dict[str, Any]]:
    return lambda cache, **options: preprocess(tiny_wan, clips, cache, num_frames=9, **options)


@pytest.fixture(scope="module")
def cache(encode: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "video"
    encode(folder)
    return folder


def test_clips_are_cached_by_size_and_frames(cache: Path) -> None:
    manifest = Manifest.load(str(cache))
    assert manifest.buckets == {"32x48x5": 1, "32x48x9": 3}
    assert (manifest.counts["samples"], manifest.counts["quarantined"], manifest.counts["total"]) == (4, 1, 5)
    (bad,) = manifest.read_quarantine(str(cache)).to_pylist()
    assert bad["sample_id"] == "bad.mp4" and bad["error"] == "MediaError"
    reader = CacheReader(str(cache))
    shapes = {
        s: tuple(row["input_latents"].shape) for s, row in zip(reader.sample_ids, reader.read(range(4)), strict=True)
    }
    assert shapes == {"short.webm": (1, 16, 2, 4, 6), **dict.fromkeys(("a.mp4", "b.mov", "c.gif"), (1, 16, 3, 4, 6))}


def test_split_equals_unsplit(tiny_wan: Path, clips: Path, cache: Path, tmp_path: Path) -> None:
    options = {"num_epochs": 2, "lora_target_modules": "q,k,v,o,ffn.0,ffn.2"}
    split = train_here(train_config(tiny_wan, cache, tmp_path / "split", **options))
    whole = train_here(train_config(tiny_wan, clips, tmp_path / "whole", task="sft", num_frames=9, **options))
    assert split.steps == whole.steps == 8 and split.loss == whole.loss
    first, second = (load_file(sorted((tmp_path / name).glob("*.safetensors"))[-1]) for name in ("split", "whole"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert all(name.startswith("diffusion_model.blocks.") for name in first), "Wan's own names"
    assert any(tensor.abs().max() > 0 for name, tensor in first.items() if "lora_B" in name), "nothing was trained"


def test_another_rate_encodes_the_videos_again_and_no_caption(
    encode: Callable[..., dict[str, Any]], cache: Path
) -> None:
    report = encode(cache, fps=8)
    assert (
        report["parameters"]["input_latents"]["encoded"] == 4 and report["parameters"]["prompt_embeds"]["encoded"] == 0
    )
    assert Manifest.load(str(cache)).buckets == {"32x48": 1, "32x48x5": 3}
