"""Images converted and scaled in bands: pixel by pixel what the whole image gives, in less memory."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.data import bands
from ray_diffsynth.data.bands import resize_crop, upright, upright_cut
from ray_diffsynth.data.color import PixelFormat, to_srgb
from ray_diffsynth.data.media import load_cut, load_image
from tests.data.test_shown import matrix_profile

RANDOM = np.random.default_rng(0)
AS_IT_IS = PixelFormat()


def pixels(width: int, height: int, channels: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (height, width, channels), np.uint8)


def indexed(width: int, height: int) -> Image.Image:
    image = Image.fromarray(pixels(width, height, 3)).quantize(32)
    image.info["transparency"] = 3
    return image


def keyed(width: int, height: int) -> Image.Image:
    image = Image.fromarray(pixels(width, height, 3) // 128 * 255)
    image.info["transparency"] = (255, 0, 255)
    return image


def profiled(width: int, height: int) -> Image.Image:
    image = Image.fromarray(pixels(width, height, 4), "RGBA")
    image.info["icc_profile"] = matrix_profile()
    return image


MODES: dict[str, Callable[[int, int], Image.Image]] = {
    "1": lambda w, h: Image.fromarray(pixels(w, h, 1)[..., 0]).convert("1"),
    "L": lambda w, h: Image.fromarray(pixels(w, h, 1)[..., 0]),
    "LA": lambda w, h: Image.fromarray(pixels(w, h, 2), "LA"),
    "P": indexed,
    "RGB": lambda w, h: Image.fromarray(pixels(w, h, 3)),
    "RGB with a transparent colour": keyed,
    "RGBA": lambda w, h: Image.fromarray(pixels(w, h, 4), "RGBA"),
    "RGBA with a profile": profiled,
    "CMYK": lambda w, h: Image.fromarray(pixels(w, h, 4), "CMYK"),
    "LAB": lambda w, h: Image.fromarray(pixels(w, h, 3), "LAB"),
    "I;16": lambda w, h: Image.fromarray(RANDOM.integers(0, 65536, (h, w), np.uint16)),
    "I": lambda w, h: Image.fromarray(RANDOM.integers(0, 65536, (h, w), np.int32)),
}
SIZES = [(37, 23), (23, 37), (64, 64), (5, 90), (90, 5)]
TARGETS = [(16, 16), (16, 48), (48, 16), (23, 37), (100, 60)]


@pytest.mark.parametrize("mode", MODES)
def test_bands_give_the_pixels_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any turn, size and target, with bands of one row up to more than the image."""
    turns = [None, *Image.Transpose]
    for number, (size, turn) in enumerate(itertools.product(SIZES, turns)):
        image = MODES[mode](*size)
        whole = to_srgb(image.copy())
        whole = whole if turn is None else whole.transpose(turn)
        height, width = TARGETS[number % len(TARGETS)]
        for band in (1, 100, 333, 10**6):
            monkeypatch.setattr(bands, "BAND_PIXELS", band)
            assert upright(image, AS_IT_IS, turn).tobytes() == whole.tobytes(), (size, turn, band)
            cut = upright_cut(image, AS_IT_IS, turn, height=height, width=width)
            assert cut.size == (width, height)
            assert cut.tobytes() == resize_crop(whole, height, width).tobytes(), (size, turn, band, height, width)


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
def test_every_level_of_wide_grey_is_scaled_exactly(bits: int) -> None:
    """The whole range against the formula in 64 bits, rounded."""
    white = (1 << bits) - 1
    levels = np.arange(white + 1)
    image = Image.fromarray(levels.astype(np.uint16).reshape(2, -1))
    right = (levels.astype(np.int64) * 255 + white // 2) // white
    for dark_is_high in (False, True):
        found = np.asarray(to_srgb(image, PixelFormat(grey_bits=bits, dark_is_high=dark_is_high)))
        assert (found == (255 - right if dark_is_high else right).reshape(2, -1, 1)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpeg", "tiff", "webp"])
def test_a_file_is_cut_as_if_it_were_whole(suffix: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels(61, 43, 3)).save(file, suffix, exif=exif)
    whole = load_image("a", file.getvalue())
    assert whole.info == {} and type(whole) is Image.Image
    monkeypatch.setattr(bands, "BAND_PIXELS", 500)
    cut = load_cut("a", file.getvalue(), height=24, width=32)
    assert cut.tobytes() == resize_crop(whole, 24, 32).tobytes() and cut.info == {}
    assert load_image("a", file.getvalue()).tobytes() == whole.tobytes()
