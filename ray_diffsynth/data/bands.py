"""A decoded image in bands of rows as a viewer shows it, so that no second copy of a large one is made."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from ray_diffsynth.data.color import PixelFormat, to_srgb

BAND_PIXELS = 1 << 20
"""Pixels that are converted at once. A smaller image is one band."""

_ACROSS = (
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
)
"""Turns that make columns of rows."""
_BACKWARDS = (
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSVERSE,
)
"""Turns whose first row is the image's last row or column."""


def upright_size(image: Image.Image, turn: Image.Transpose | None) -> tuple[int, int]:
    """(width, height) of the image turned."""
    return image.size[::-1] if turn in _ACROSS else image.size


def upright_bands(
    image: Image.Image, stored: PixelFormat, turn: Image.Transpose | None
) -> Iterator[tuple[int, Image.Image]]:
    """The rows of the image turned, as 8-bit sRGB (see `to_srgb`): the first row of each band, and the band.

    The image must be decoded; a band may be the image itself. Raises PixelRangeError.
    """
    width, height = upright_size(image, turn)
    rows = max(BAND_PIXELS // max(width, 1), 1)
    for start in range(0, height, rows):
        end = min(start + rows, height)
        first, last = (height - end, height - start) if turn in _BACKWARDS else (start, end)
        box = (first, 0, last, width) if turn in _ACROSS else (0, first, width, last)
        band = to_srgb(image if box == (0, 0, *image.size) else image.crop(box), stored)
        yield start, band if turn is None else band.transpose(turn)


def upright(image: Image.Image, stored: PixelFormat, turn: Image.Transpose | None) -> Image.Image:
    """The whole image turned, as 8-bit sRGB, without what its file says beside the pixels. Raises PixelRangeError."""
    whole = Image.new("RGB", upright_size(image, turn))
    for start, band in upright_bands(image, stored, turn):
        whole.paste(band, (0, start))
    return whole


def upright_cut(
    image: Image.Image, stored: PixelFormat, turn: Image.Transpose | None, *, height: int, width: int
) -> Image.Image:
    """`resize_crop` of `upright`, pixel by pixel, without making the latter. Raises PixelRangeError.

    Pillow resizes along the rows first, one by one, and rounds to 8 bits before it resizes along the columns; so rows
    may come in bands.
    """
    size = upright_size(image, turn)
    covered = covering_size(size, height, width)
    narrow = Image.new("RGB", (covered[0], size[1]))
    for start, band in upright_bands(image, stored, turn):
        narrow.paste(_resized(band, (covered[0], band.height)), (0, start))
    return centre_crop(_resized(narrow, covered), height, width)


def resize_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """An image of `height` x `width` pixels: scaled to cover it (bilinear, antialiased), its centre cropped.

    DiffSynth-Studio's transform.
    """
    return centre_crop(_resized(image, covering_size(image.size, height, width)), height, width)


def covering_size(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """(width, height) of an image of this size scaled so that it just covers `height` x `width` pixels."""
    scale = max(width / size[0], height / size[1])
    return max(round(size[0] * scale), width), max(round(size[1] * scale), height)


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre of an image that is at least so large; the same object if it is of this size."""
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
