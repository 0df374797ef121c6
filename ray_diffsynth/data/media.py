"""Pictures: header, decoding to RGB, resize and crop, content hash. Pillow only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from ray_diffsynth.data import storage
from ray_diffsynth.errors import UserError

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)


class MediaError(UserError):
    """A picture that is absent or cannot be decoded: `path` and `reason`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@contextmanager
def reading(path: str) -> Iterator[IO[bytes]]:
    """The open file; whatever goes wrong with it becomes a MediaError with a readable reason."""
    try:
        with storage.open_input(path) as file:
            if file.size() == 0:
                raise MediaError(path, "the file is empty (0 bytes)")
            yield cast("IO[bytes]", file)
    except (MediaError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise MediaError(path, "no such file") from error
    except IsADirectoryError as error:
        raise MediaError(path, "is a folder, not a picture") from error
    except UnidentifiedImageError as error:
        raise MediaError(path, "not a picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise MediaError(path, f"too large to decode: {error}") from error
    # Pillow's decoders raise nearly anything on damaged files: SyntaxError, struct.error, zlib.error, IndexError …
    except Exception as error:
        raise MediaError(path, f"damaged or truncated ({type(error).__name__}: {error})") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation (1 to 8) that is still to be applied, from the header alone."""
    if image.format == "TIFF":
        return 1  # Pillow turns it itself and reports the turned size
    # Not image.getexif(): for PNG it decodes the pixels to look for EXIF behind them.
    value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    return value if value in _TURNS else 1


def probe_image(path: str) -> tuple[int, int]:
    """(width, height) in pixels as `load_image` would return it, from the header alone. Raises MediaError."""
    with reading(path) as file, Image.open(file) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _SWAPS_SIDES else (width, height)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: alpha laid over white, 16-bit grey scaled, everything else as Pillow converts it."""
    if image.mode.startswith("I"):
        # 16-bit grey (mode I is how some formats are opened): 65535 -> 255, rounded.
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"32-bit pixels up to {abs(grey).max()} have no known range; save as 8 or 16 bits")
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save as 8 or 16 bits")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    return image.convert("RGB")


def load_image(path: str) -> Image.Image:
    """The picture as RGB, upright by its EXIF orientation; the first frame of an animation. Raises MediaError."""
    with reading(path) as file, Image.open(file) as image:
        turn = _TURNS.get(_orientation(image))
        image.load()
        rgb = _to_rgb(image)
    # A new object without the source's info: EXIF must not turn it again, nor a palette's transparency be read.
    plain = rgb if turn is None else rgb.transpose(turn)
    return Image.frombytes("RGB", plain.size, plain.tobytes())


def resize_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale to cover `height` x `width` (bilinear, antialiased) and crop the centre: DiffSynth-Studio's transform."""
    scale = max(width / image.width, height / image.height)
    covered = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    if image.size != covered:
        image = image.resize(covered, Image.Resampling.BILINEAR)
    left, top = round((covered[0] - width) / 2), round((covered[1] - height) / 2)
    return image if covered == (width, height) else image.crop((left, top, left + width, top + height))


def content_hash(path: str) -> str:
    """Hex blake2b-160 of the file's bytes. Raises MediaError."""
    digest: Any = hashlib.blake2b(digest_size=20)
    with reading(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())
