"""`python -m ray_diffsynth.cache` on what stage 1 wrote: damage, repair and completion; pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.cache.__main__ import main
from ray_diffsynth.cache.manifest import Manifest
from tests.e2e.conftest import Preprocess

pytestmark = pytest.mark.ray


def test_repair_and_a_rerun_bring_back_the_very_same_cache(
    tiny_qwen: Path, dataset: Path, own_cache: Path, preprocess: Preprocess
) -> None:
    manifest = (own_cache / "manifest.json").read_bytes()
    files = {path: path.read_bytes() for path in own_cache.glob("*/*.parquet")}
    damaged = sorted((own_cache / "vae").glob("*.parquet"))[0]
    lost = len(damaged.read_bytes())
    damaged.write_bytes(damaged.read_bytes()[: lost // 2])
    (own_cache / "text_encoder" / ".x.parquet.tmp-1-ab").write_bytes(b"half")
    assert main(["verify", str(own_cache)]) == 1
    assert main(["repair", str(own_cache)]) == 0 and not (own_cache / "manifest.json").exists()
    report = preprocess(tiny_qwen, dataset, own_cache)
    assert 0 < report["parameters"]["input_latents"]["encoded"] < 12
    assert report["parameters"]["prompt_embeds"]["encoded"] == 0
    assert (own_cache / "manifest.json").read_bytes() == manifest
    assert {path: path.read_bytes() for path in own_cache.glob("*/*.parquet")} == files
    assert main(["verify", str(own_cache)]) == 0


def test_preview_decodes_pictures_beside_their_captions(tiny_qwen: Path, fp32_cache: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    command = ["preview", str(fp32_cache), "--model", str(tiny_qwen), "--output", str(sheet), "--samples", "3"]
    assert main(command) == 0
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 3 * 128 and pixels.shape[1] > 512
    # Decoded pictures on the left, dark text on white on the right.
    assert pixels[:, 8:264].std() > 5 and 0 < (pixels[:, 280:] < 128).mean() < 0.3


def test_captions_are_kept_for_people(fp32_cache: Path, dataset: Path) -> None:
    lines = (dataset / "metadata.csv").read_text().splitlines()[1:]
    captions = Manifest.load(str(fp32_cache)).read_captions(str(fp32_cache))
    assert sorted(str(caption) for caption in captions) == sorted(line.split(",", 1)[1].strip('"') for line in lines)
