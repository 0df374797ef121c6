"""What stage 1 leaves behind: exactly what stage 2 reads, encoded once, reused when nothing changed."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.reader import CacheReader
from tests.e2e.conftest import Preprocess

pytestmark = pytest.mark.ray


def test_the_cache_holds_what_stage_2_reads_and_nothing_else(fp32_cache: Path, dataset: Path) -> None:
    reader = CacheReader(str(fp32_cache))
    assert len(reader) == 12 and reader.manifest.buckets == {"32x64": 4, "64x64": 8}
    for sample in reader.read(range(12)):
        assert set(sample) == {"input_latents", "prompt_embeds"}
    assert reader.manifest.counts["texts"] == len(set(captions(dataset))) == 11
    columns = {name for path in fp32_cache.glob("*/*.parquet") for name in pq.read_schema(path).names}
    assert not [name for name in columns if name.startswith(("noise", "input_image", "latents"))]


def test_the_latents_are_diffusers_own(fp32_cache: Path, dataset: Path, tiny_qwen: Path) -> None:
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage.from_pretrained(str(tiny_qwen), subfolder="vae")
    reader = CacheReader(str(fp32_cache))
    row = list(reader.sample_ids).index("shapes_00000.png")
    pixels = (
        torch.from_numpy(np.array(Image.open(dataset / "shapes_00000.png").convert("RGB"))).permute(2, 0, 1).float()
    )
    with torch.no_grad():
        latents = vae.encode((pixels / 127.5 - 1)[None, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(reader.read([row])[0]["input_latents"], (latents - mean) / std, rtol=1e-5, atol=1e-5)


def captions(dataset: Path) -> list[str]:
    return [line.split(",", 1)[1] for line in (dataset / "metadata.csv").read_text().splitlines()[1:]]


def counts(report: dict) -> dict[str, tuple[int, int]]:
    return {name: (item["encoded"], item["reused"]) for name, item in report["parameters"].items()}


def test_only_what_changed_is_encoded_again(
    tiny_qwen: Path, dataset: Path, own_cache: Path, preprocess: Preprocess, tmp_path: Path
) -> None:
    import shutil

    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    # The same pictures under another folder: content addresses do not care.
    before = (own_cache / "manifest.json").read_bytes()
    assert counts(preprocess(tiny_qwen, data, own_cache)) == {"input_latents": (0, 12), "prompt_embeds": (0, 12)}
    assert (own_cache / "manifest.json").read_bytes() == before
    # One caption is edited and one picture replaced.
    table = data / "metadata.csv"
    lines = table.read_text().splitlines()
    lines[2] = lines[2].split(",")[0] + ",something quite new"
    table.write_text("\n".join(lines[:-1]) + "\n")  # and the last row is removed
    Image.new("RGB", (64, 64), "teal").save(data / "shapes_00003.png")
    report = preprocess(tiny_qwen, data, own_cache)
    assert counts(report)["input_latents"][0] == 1 and counts(report)["prompt_embeds"][0] == 1
    reader = CacheReader(str(own_cache))
    assert len(reader) == report["samples"] == 11 and "wide/shapes_00003.png" not in reader.sample_ids
    fresh = tmp_path / "fresh"
    preprocess(tiny_qwen, data, fresh)
    for mine, new in zip(reader.read(range(11)), CacheReader(str(fresh)).read(range(11)), strict=True):
        assert all(torch.equal(mine[name], new[name]) for name in mine)


def test_another_dataset_does_not_replace_a_cache(
    tiny_qwen: Path, own_cache: Path, preprocess: Preprocess, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    (tmp_path / "metadata.csv").write_text("image,prompt\nother.png,a night\n")
    before = (own_cache / "manifest.json").read_bytes()
    with pytest.raises(CacheError, match="another dataset"):
        preprocess(tiny_qwen, tmp_path, own_cache)
    assert (own_cache / "manifest.json").read_bytes() == before


def test_the_report_counts(fp32_cache: Path) -> None:
    report = json.loads((fp32_cache / "report.json").read_text())
    assert report["samples"] == 12 and report["quarantined"] == 0
    assert report["parameters"]["input_latents"] == {"encoded": 12, "reused": 0}
    assert report["parameters"]["prompt_embeds"] == {"encoded": 12, "reused": 0}  # 11 captions and the empty one
    assert report["config"]["dtype"] == "float32" and report["versions"]["ray"]
