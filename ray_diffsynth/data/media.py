"""Pictures: header, decoding to RGB, resize and crop, content hash. Pillow only.

What goes wrong while the bytes are fetched is kept apart from what is wrong with them: only that is the file's own.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from ray_diffsynth.data import storage
from ray_diffsynth.errors import UserError

logger = logging.getLogger(__name__)

READS = 3
"""How often a file is tried to be read."""
PAUSE_SECONDS = 0.5
"""Before the second try; twice as long before the next."""
T = TypeVar("T")

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


class SourceUnavailable(MediaError):
    """A file that cannot be read now (storage, network, rights), which says nothing about what it holds."""


class SourceChanged(MediaError):
    """A file that is not the one that was scanned any more."""


PASSING = (SourceUnavailable, SourceChanged)
"""Errors that are not the content's: the next run tries again."""


def _fetched(path: str, read: Callable[[], T]) -> T:
    """What `read` returns, tried again where the storage fails. Raises MediaError, SourceUnavailable among them."""
    for attempt in range(1, READS + 1):
        try:
            return read()
        except (UserError, MemoryError):
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MediaError(path, "no such file") from error
        except IsADirectoryError as error:
            raise MediaError(path, "is a folder, not a picture") from error
        except PermissionError as error:
            raise SourceUnavailable(path, f"may not be read ({error})") from error
        except ValueError as error:  # a name that no file can have
            raise MediaError(path, f"no such file ({error})") from error
        # Clients of object stores raise errors of their own.
        except Exception as error:
            if attempt == READS:
                raise SourceUnavailable(path, f"cannot be read now ({type(error).__name__}: {error})") from error
            logger.debug("%s: %s; trying again", path, error)
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("the last try returns or raises")


def fetch(path: str) -> bytes:
    """The whole file. Raises MediaError when it is absent or empty, SourceUnavailable when it cannot be read now."""
    data = _fetched(path, lambda: storage.read_bytes(path))
    if not data:
        raise MediaError(path, "the file is empty (0 bytes)")
    return data


class _Watched:
    """An open file that remembers the error of its storage, however a decoder reports that."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: Exception | None = None

    def _watch(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except Exception as error:
            self.error = error
            raise

    def read(self, size: int = -1) -> bytes:
        return self._watch(lambda: self.file.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._watch(lambda: self.file.seek(offset, whence))

    def tell(self) -> int:
        return self._watch(self.file.tell)


@contextmanager
def reading(path: str) -> Iterator[IO[bytes]]:
    """The open file, for what is too large to be read at once; whatever goes wrong with it becomes a MediaError."""
    with _fetched(path, lambda: storage.open_input(path)) as file:
        if file.size() == 0:
            raise MediaError(path, "the file is empty (0 bytes)")
        watched = _Watched(cast("IO[bytes]", file))
        try:
            with decoding(path):
                yield cast("IO[bytes]", watched)
        except MediaError as error:
            if watched.error is None:
                raise
            why = f"cannot be read now ({type(watched.error).__name__}: {watched.error})"
            raise SourceUnavailable(path, why) from error


@contextmanager
def decoding(path: str) -> Iterator[None]:
    """Within it, whatever a decoder raises becomes a MediaError with a readable reason."""
    try:
        yield
    except (UserError, MemoryError):
        raise
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


def probe_image(path: str, data: bytes | None = None) -> tuple[int, int]:
    """(width, height) in pixels as `load_image` would return it, from the header alone. Raises MediaError.

    `data`: the file's bytes, where they have been read already.
    """
    file = io.BytesIO(fetch(path) if data is None else data)
    with decoding(path), Image.open(file) as image:
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


def load_image(path: str, data: bytes | None = None) -> Image.Image:
    """The picture as RGB, upright by its EXIF orientation; the first frame of an animation. Raises MediaError.

    `data`: the file's bytes, where they have been read already.
    """
    file = io.BytesIO(fetch(path) if data is None else data)
    with decoding(path), Image.open(file) as image:
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


def bytes_hash(data: bytes) -> str:
    """Hex blake2b-160: the content hash of a file of these bytes."""
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def content_hash(path: str, copy: IO[bytes] | None = None) -> str:
    """Hex blake2b-160 of the file's bytes, which are written to `copy` too. Raises MediaError."""
    digest: Any = hashlib.blake2b(digest_size=20)
    with reading(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if copy is not None:
                copy.write(block)
    return str(digest.hexdigest())
