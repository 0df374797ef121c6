"""Images of every kind become upright RGB; bad ones an error that says why."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.data.bands import resize_crop
from ray_diffsynth.data.media import MediaError, content_hash, load_image, probe_image


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    """Red grows to the right, green downwards: every orientation looks different."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 64)], -1).astype(np.uint8))


def save(path: Path, image: Image.Image, **options: object) -> str:
    image.save(path, **options)  # type: ignore[arg-type]
    return str(path)


def error_of(path: str, *, probe: bool = True) -> str:
    if probe:
        with pytest.raises(MediaError):
            probe_image(path)
    with pytest.raises(MediaError) as caught:
        load_image(path)
    assert str(caught.value).startswith(path)
    return caught.value.reason


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = gradient()
    back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if back is None else upright.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"p.{suffix}", stored, exif=exif)
    assert probe_image(path) == upright.size
    loaded = load_image(path)
    assert loaded.size == upright.size and loaded.mode == "RGB" and not loaded.info
    assert np.abs(np.asarray(loaded).astype(int) - np.asarray(upright)).mean() < 8


def test_modes(tmp_path: Path) -> None:
    image = gradient()
    grey = np.asarray(image.convert("L"))
    white = np.array([255, 255, 255])

    cmyk = load_image(save(tmp_path / "cmyk.jpg", image.convert("CMYK")))
    assert cmyk.mode == "RGB" and np.abs(np.asarray(cmyk).astype(int) - np.asarray(image)).mean() < 16

    palette = load_image(save(tmp_path / "p.png", image.quantize(64)))
    assert palette.mode == "RGB" and np.abs(np.asarray(palette).astype(int) - np.asarray(image)).mean() < 16

    wide = Image.fromarray((grey.astype(np.uint16) << 8) | grey)
    for name in ("i16.png", "i16.tif"):
        assert (np.asarray(load_image(save(tmp_path / name, wide))) == grey[..., None]).all()
    assert (np.asarray(load_image(save(tmp_path / "l.png", image.convert("L")))) == grey[..., None]).all()
    integers = Image.fromarray(grey.astype(np.int32) * 257)
    assert (np.asarray(load_image(save(tmp_path / "i.tif", integers))) == grey[..., None]).all()

    clear = image.copy()
    clear.putalpha(0)
    assert (np.asarray(load_image(save(tmp_path / "rgba.png", clear))) == white).all()
    assert (np.asarray(load_image(save(tmp_path / "la.png", clear.convert("LA")))) == white).all()
    indexed = Image.new("P", (20, 20), 0)
    indexed.putpalette([255, 0, 0, 0, 255, 0])
    assert (np.asarray(load_image(save(tmp_path / "t.png", indexed, transparency=0))) == white).all()
    assert load_image(save(tmp_path / "1.png", image.convert("1"))).mode == "RGB"
    animation = save(tmp_path / "a.gif", image, save_all=True, append_images=[image.rotate(90)])
    assert load_image(animation).size == image.size


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    values = np.full((20, 20), 0.5, np.float32)
    assert "floating-point" in error_of(save(tmp_path / "f.tif", Image.fromarray(values)), probe=False)
    large = Image.fromarray(np.full((20, 20), 1 << 20, np.int32))
    assert "no known range" in error_of(save(tmp_path / "i.tif", large), probe=False)


def test_bad_files(tmp_path: Path) -> None:
    assert error_of(str(tmp_path / "absent.png")) == "no such file"
    (tmp_path / "empty.png").write_bytes(b"")
    assert error_of(str(tmp_path / "empty.png")) == "the file is empty (0 bytes)"
    (tmp_path / "text.png").write_text("not an image")
    assert error_of(str(tmp_path / "text.png")) == "not an image that Pillow can read"
    (tmp_path / "folder.png").mkdir()
    assert error_of(str(tmp_path / "folder.png"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / f"p.{suffix}"
    save(path, Image.fromarray(noise))
    whole = path.read_bytes()
    for keep in (8, len(whole) // 2):
        path.write_bytes(whole[:keep])
        with pytest.raises(MediaError):
            load_image(str(path))


def test_damaged_bytes_raise_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for suffix in ("png", "jpg", "webp", "tif", "gif", "bmp"):
        path = tmp_path / f"p.{suffix}"
        save(path, gradient())
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(20):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 8)] = rng.integers(0, 255, 8)
            path.write_bytes(damaged.tobytes())
            for read in (probe_image, load_image):
                try:
                    read(str(path))
                except MediaError as error:
                    assert error.reason


def test_a_header_is_enough_to_probe(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    save(path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)))
    path.write_bytes(path.read_bytes()[:200])
    assert probe_image(str(path)) == (300, 200)


def test_resize_crop_is_diffsynths_transform() -> None:
    image = gradient(100, 60)
    assert resize_crop(image, 60, 100) is image
    # cover 48x48: scale 0.8 -> 80x48, then the middle 48 columns
    expected = image.resize((80, 48), Image.Resampling.BILINEAR).crop((16, 0, 64, 48))
    assert (np.asarray(resize_crop(image, 48, 48)) == np.asarray(expected)).all()
    for width, height, to in ((33, 77, (64, 32)), (1001, 999, (16, 512)), (16, 16, (512, 16))):
        result = resize_crop(gradient(width, height), *to)
        assert (result.height, result.width) == to


def test_urls_and_hash() -> None:
    data = io.BytesIO()
    gradient().save(data, format="PNG")
    fsspec.filesystem("memory").pipe_file("/media/p.png", data.getvalue())
    assert probe_image("memory://media/p.png") == (40, 24)
    assert load_image("memory://media/p.png").size == (40, 24)
    fsspec.filesystem("memory").pipe_file("/media/copy.png", data.getvalue())
    assert content_hash("memory://media/p.png") == content_hash("memory://media/copy.png")
    with pytest.raises(MediaError, match="no such file"):
        content_hash("memory://media/absent.png")


def test_the_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(MediaError("a.png", "why")))
    assert str(error) == "a.png: why" and error.path == "a.png"
