"""Bad input: a clear error or a quarantine entry, nothing half-written, and every row accounted for."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.demo.tiny import build_tiny_model
from ray_diffsynth.errors import UserError
from tests.e2e.conftest import Preprocess, train_config
from tests.training.helpers import train_here

pytestmark = pytest.mark.ray


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with one row of each kind of trouble."""
    root = tmp_path_factory.mktemp("nasty")
    picture = Image.fromarray(noise(0))
    picture.save(root / "good.png")
    (root / "corrupt.png").write_bytes((root / "good.png").read_bytes()[:600])
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("this is no picture")
    picture.resize((1, 1)).save(root / "dot.png")
    picture.convert("CMYK").save(root / "cmyk.jpg")
    picture.convert("P").save(root / "palette.png")
    Image.fromarray(noise(1)[..., 0].astype(np.uint16) * 257).save(root / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(noise(2)[:32]).save(root / "rotated.jpg", exif=exif)
    picture.save(root / "übergröße 🎨.png")
    rows = [
        *("good.png,a good one", "good.png,a good one", "good.png,another caption", "corrupt.png,cut short"),
        *("empty.png,zero bytes", "text.png,not a picture", "dot.png,one pixel", "absent.png,nobody home"),
        *("cmyk.jpg,for print", "palette.png,few colours", "deep.png,sixteen bits", "rotated.jpg,on its side"),
        *("übergröße 🎨.png,ein Bild", "cmyk.jpg,", "palette.png,NaN"),
    ]
    (root / "metadata.csv").write_text("image,prompt\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def nasty_cache(tiny_qwen: Path, nasty: Path, preprocess: Preprocess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("nasty-cache") / "cache"
    preprocess(tiny_qwen, nasty, cache, batch_size=4)
    return cache


def test_every_row_is_in_the_manifest_or_in_quarantine(nasty_cache: Path) -> None:
    manifest = Manifest.load(str(nasty_cache))
    quarantine = manifest.read_quarantine(str(nasty_cache)).to_pylist()
    reasons = {row["sample_id"]: row["error"] for row in quarantine}
    assert set(CacheReader(str(nasty_cache)).sample_ids) == {
        *(
            "good.png",
            "good.png#2",
            "cmyk.jpg",
            "cmyk.jpg#2",
            "palette.png",
            "deep.png",
            "rotated.jpg",
            "übergröße 🎨.png",
        ),
    }
    for name in ("corrupt.png", "empty.png", "text.png", "absent.png"):
        assert reasons[name] == "MediaError", name
    assert reasons["dot.png"] == "BucketError"
    assert sorted(reasons.values()) == sorted(["MediaError"] * 4 + ["BucketError", "DuplicateRow", "MissingValue"])
    assert manifest.counts["samples"] + manifest.counts["quarantined"] == manifest.counts["total"] == 15
    assert all(row["message"] for row in quarantine)


def test_a_rotated_picture_is_upright(nasty_cache: Path) -> None:
    assert Manifest.load(str(nasty_cache)).buckets == {"64x32": 1, "64x64": 7}


def test_a_rerun_tries_no_decode_failure_again_and_changes_nothing(
    tiny_qwen: Path, nasty: Path, nasty_cache: Path, preprocess: Preprocess
) -> None:
    before = (nasty_cache / "manifest.json").read_bytes()
    report = preprocess(tiny_qwen, nasty, nasty_cache, batch_size=4)
    assert all(item["encoded"] == 0 for item in report["parameters"].values())
    assert (nasty_cache / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: None, "metadata"),
        (lambda root: (root / "metadata.csv").write_text("picture,prompt\na.png,x\n"), "picture"),
        (lambda root: (root / "metadata.csv").write_text("image,prompt\nnone.png,x\n"), "none of 1 samples"),
    ],
    ids=["no metadata", "no image column", "nothing usable"],
)
def test_an_unusable_dataset_writes_no_manifest(
    tiny_qwen: Path, preprocess: Preprocess, tmp_path: Path, write: object, message: str
) -> None:
    assert callable(write)
    data = tmp_path / "data"
    data.mkdir()
    write(data)
    with pytest.raises(UserError, match=message):
        preprocess(tiny_qwen, data, tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_model_folder_without_config_is_named(
    tiny_qwen: Path, dataset: Path, preprocess: Preprocess, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_qwen, tmp_path / "model"))
    (model / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"vae.*config\.json|config\.json.*vae"):
        preprocess(model, dataset, tmp_path / "cache")


def start(model: Path, cache: Path, output: Path, **options: object) -> None:
    train_here(train_config(model, cache, output, max_steps=1, **options))


def test_a_truncated_cache_file_is_named(tiny_qwen: Path, own_cache: Path, tmp_path: Path) -> None:
    for path in (own_cache / "vae").glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CacheError, match=r"vae.*parquet.*repair"):
        start(tiny_qwen, own_cache, tmp_path / "out")


def test_a_cache_of_another_encoder_is_refused_before_step_0(fp32_cache: Path, tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "other", seed=7)
    with pytest.raises(UserError, match="vae|text_encoder") as caught:
        start(other, fp32_cache, tmp_path / "out")
    assert str(other) in str(caught.value) and str(fp32_cache) in str(caught.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_lora_targets_that_match_nothing_list_what_exists(tiny_qwen: Path, fp32_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"to_q") as caught:
        start(tiny_qwen, fp32_cache, tmp_path / "out", lora_target_modules="to_quux")
    assert "to_quux" in str(caught.value)


def test_a_cache_for_other_trained_models_is_refused(tiny_qwen: Path, fp32_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trained models"):
        start(tiny_qwen, fp32_cache, tmp_path / "out", lora_base_model="text_encoder", lora_target_modules="q_proj")


def test_latents_are_finite_for_every_odd_picture(nasty_cache: Path) -> None:
    reader = CacheReader(str(nasty_cache))
    for sample in reader.read(range(len(reader))):
        assert torch.isfinite(sample["input_latents"]).all()
    parts = Manifest.load(str(nasty_cache)).index_parts
    assert sum(pq.read_table(nasty_cache / part.file).num_rows for part in parts) == len(reader)
