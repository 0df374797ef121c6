"""Images as they are shown: 8-bit sRGB by the embedded profile, grey of any depth, transparency over white."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms


class PixelRangeError(ValueError):
    """Pixels whose numbers stand for no known brightness."""


_SPACES = {"L": ("GRAY", "RGB"), "RGB": ("RGB",), "CMYK": ("CMYK",), "LAB": ("Lab",)}
"""Mode of the pixels -> colour spaces of a profile that can be theirs. Grey may stand for three equal channels."""
_KEY_SCALE = {"L;2": 85, "L;4": 17}
"""Pillow scales grey of 2 and 4 bits to 8, and leaves the transparent grey of a PNG as it was."""


@dataclass(frozen=True)
class PixelFormat:
    """How a file stores its pixels, where the decoded image does not say it.

    raw_mode: Pillow's name, or "". grey_bits: of a grey level. dark_is_high: grey whose largest number is black.
    """

    raw_mode: str = ""
    grey_bits: int = 16
    dark_is_high: bool = False

    @classmethod
    def of(cls, image: Image.Image) -> PixelFormat:
        """By the header. Ask before the pixels are decoded."""
        tiles = getattr(image, "tile", None)
        arguments = tiles[0][3] if tiles else ""
        found = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(258, (16,))
        return cls(
            found if isinstance(found, str) else "",
            bits[0] if isinstance(bits, tuple) else bits,
            tags.get(262) == 0,  # WhiteIsZero, which Pillow turns round for 8 bits only
        )


_AS_IT_IS = PixelFormat()


def color_mode(image: Image.Image) -> str:
    """What its pixels are without transparency and depth: L, RGB, CMYK or LAB."""
    if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I"):
        return "L"
    return image.mode if image.mode in ("CMYK", "LAB") else "RGB"


def profile_problem(image: Image.Image) -> str:
    """Why the embedded colour profile cannot be used; "" if it can, or there is none. From the header alone."""
    profile = image.info.get("icc_profile")
    return _transform(profile, color_mode(image))[1] if profile else ""


def to_srgb(image: Image.Image, stored: PixelFormat = _AS_IT_IS) -> Image.Image:
    """8-bit sRGB as a viewer shows it; maybe the same object. Each pixel by itself: a part gives the part of the whole.

    The embedded profile is applied (perceptual intent), unless it is damaged or another colour space's; without one
    pixels are sRGB. Alpha and transparent colours lie over white. Raises PixelRangeError for pixels without a known
    range.
    """
    pixels, alpha = _split(image, stored)
    profile = image.info.get("icc_profile")
    transform = _transform(profile, pixels.mode)[0] if profile else None
    if transform is None and pixels.mode == "LAB":
        transform = _lab()
    if transform is not None:
        pixels = pixels if pixels.mode == transform.input_mode else pixels.convert(transform.input_mode)
        pixels = transform.apply(pixels)
    elif pixels.mode != "RGB":
        pixels = pixels.convert("RGB")
    if alpha is None:
        return pixels
    return Image.composite(pixels, Image.new("RGB", pixels.size, "white"), alpha)


def _split(image: Image.Image, stored: PixelFormat) -> tuple[Image.Image, Image.Image | None]:
    """The pixels in a `color_mode`, 8 bits each, and their alpha (L), if there is any."""
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        return _split_grey(image, key, stored)
    if image.mode == "F":
        raise PixelRangeError("floating-point pixels have no known range; save as 8 or 16 bits")
    if key is not None and image.mode in ("L", "RGB"):
        # Of 16 bits Pillow keeps the upper eight, of the key all.
        image.info["transparency"] = (
            tuple(value >> 8 for value in key) if stored.raw_mode.startswith("RGB;16") else _scaled_key(key, stored)
        )
    if image.mode == "La":
        image = image.convert("LA")
    elif image.mode in ("RGBa", "PA") or (image.mode == "P" and image.has_transparency_data):
        image = image.convert("RGBA")
    elif image.has_transparency_data and image.mode in ("1", "L", "RGB"):
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.mode == "RGBA":
        return image.convert("RGB"), image.getchannel("A")
    mode = color_mode(image)
    return (image if image.mode == mode else image.convert(mode)), None


def _scaled_key(key: object, stored: PixelFormat) -> object:
    return key * _KEY_SCALE.get(stored.raw_mode, 1) if isinstance(key, int) else key


def _split_grey(image: Image.Image, key: object, stored: PixelFormat) -> tuple[Image.Image, Image.Image | None]:
    """Grey of more than 8 bits, its white as 255, rounded."""
    white = (1 << stored.grey_bits) - 1 if image.mode.startswith("I;") and 8 < stored.grey_bits < 16 else 65535
    levels = np.asarray(image)
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high > white:
        raise PixelRangeError(
            f"pixels from {low} to {high} are outside of {white.bit_length()} bits and have no known range; "
            "save as 8 or 16 bits"
        )
    scaled = ((levels.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    alpha = np.where(levels == key, np.uint8(0), np.uint8(255)) if isinstance(key, int) else None
    grey = Image.fromarray(255 - scaled if stored.dark_is_high else scaled)
    return grey, None if alpha is None else Image.fromarray(alpha)


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """From an embedded profile to sRGB for pixels of a mode; None for one that is sRGB; why it cannot be used."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
    except (OSError, ValueError, TypeError, AttributeError):
        return None, "its colour profile is damaged and was not used"
    if space not in _SPACES[mode]:
        return None, f"its colour profile is for {space}, its pixels are {mode}: the profile was not used"
    source = "RGB" if space == "RGB" else mode
    try:
        found = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), source, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None, "its colour profile cannot be converted to sRGB and was not used"
    assert isinstance(found, ImageCms.ImageCmsTransform)
    return (None if source != "LAB" and _changes_nothing(found) else found), ""


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether it leaves every colour as it is, within rounding: the profile of sRGB, under any name."""
    if transform.input_mode == "CMYK":
        return False
    steps = np.linspace(0, 255, 16).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(16, 256, 3)
    before = Image.fromarray(cube).convert(transform.input_mode)
    after = np.asarray(transform.apply(before)).astype(int)
    return bool(np.abs(after - np.asarray(before.convert("RGB"))).max() <= 1)


@lru_cache(maxsize=1)
def _lab() -> ImageCms.ImageCmsTransform:
    found = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    assert isinstance(found, ImageCms.ImageCmsTransform)
    return found
