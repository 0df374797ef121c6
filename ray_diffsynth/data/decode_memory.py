"""How much main memory decoding a file takes at its peak, in bytes, by what its header says. Pure arithmetic.

Measured for each kind of file: the figure is no less than what a process grows by, and of a large image at most three
times that.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_diffsynth.data.bands import BAND_PIXELS, covering_size

_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Mode -> bytes that Pillow takes a pixel; 4 for all others."""
_CHANNELS = {"1": 1, "L": 1, "P": 1, "I;16": 1, "LA": 2, "RGB": 3, "YCbCr": 3}
"""Mode -> numbers a pixel in the file; 4 for all others."""
_OWN = {"WEBP": 13, "AVIF": 8}
"""Format -> bytes a pixel that its decoder takes beside the image: its canvas, and the pixels that it hands over."""
_BAND_COPIES = 6
"""Copies of a band, of up to 4 bytes a pixel, on its way to sRGB."""
_COPIES = 3
"""How often what is made of a file is in memory at once, on its way to an encoder."""


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an image says. `format` and `mode`: Pillow's names; `file_bytes`: of the whole file.

    `progressive`: a JPEG whose pixels come in several scans. `turned`: a TIFF that its decoder itself turns.
    """

    format: str
    mode: str
    width: int
    height: int
    file_bytes: int
    progressive: bool = False
    turned: bool = False

    @property
    def _own(self) -> int:
        """Bytes a pixel that the decoder takes beside the image."""
        channels = _CHANNELS.get(self.mode, 4)
        if self.format in ("JPEG", "MPO"):
            return 2 * channels if self.progressive else 0  # all coefficients, of 16 bits
        if self.format == "JPEG2000":
            return 4 * channels + channels * 2  # numbers of 32 bits, and those of a tile
        return _OWN.get(self.format, _STORED.get(self.mode, 4) if self.turned else 0)

    @property
    def decode_bytes(self) -> int:
        """Decoding the image into what `load_cut` works on, without what it makes of that (`cut_bytes`)."""
        pixels = self.width * self.height
        band = min(pixels, max(BAND_PIXELS, self.width, self.height))
        stored = pixels * _STORED.get(self.mode, 4)
        return self.file_bytes + stored + max(pixels * self._own, band * 4 * _BAND_COPIES)

    @property
    def whole_bytes(self) -> int:
        """Decoding the image into all its pixels as RGB."""
        return self.decode_bytes + self.width * self.height * 4


def cut_bytes(width: int, height: int, target_height: int, target_width: int) -> int:
    """What cutting an image of this size to a target takes beside it: it is scaled along both sides, then cropped.

    Sizes in pixels.
    """
    covered_width, covered_height = covering_size((width, height), target_height, target_width)
    return 4 * (covered_width * (2 * height + covered_height) + target_height * target_width)


def kept_bytes(target_height: int, target_width: int, frames: int = 1) -> int:
    """What stays of a decoded file on its way to an encoder: its pixels, as often as they are in memory at once."""
    return target_height * target_width * frames * 3 * _COPIES


def sent_bytes(kept: int) -> int:
    """What of `kept_bytes` is handed to an encoder: once the pixels."""
    return kept // _COPIES
