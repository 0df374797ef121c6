"""Images: bytes of the file, header, decoding to upright sRGB, resize and crop, content hash. Pillow only.

What goes wrong while the bytes are fetched is kept apart from what is wrong with them: only that is the file's own.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar, cast

from PIL import Image, UnidentifiedImageError

from ray_diffsynth import storage
from ray_diffsynth.data.bands import upright, upright_cut
from ray_diffsynth.data.color import PixelFormat, PixelRangeError, profile_problem
from ray_diffsynth.data.color_signal import png_chunk, signalled_profile
from ray_diffsynth.data.decode_memory import ImageHeader
from ray_diffsynth.data.placeholders import HEAD, wrong_content
from ray_diffsynth.errors import UserError
from ray_diffsynth.storage.watched import WatchedFile

logger = logging.getLogger(__name__)

READ_ATTEMPTS = 5
"""Attempts to read a file, beside those that the client of a store makes by itself."""
PAUSE_SECONDS = 0.5
"""Pause before the second attempt, in seconds; doubled before each further one."""
_NO_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of the operating system about names that no file can have."""
T = TypeVar("T")

MAX_DECODE_BYTES = 4 << 30
"""Main memory that decoding one file may take where no other limit is given."""

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
_SEQUENCES = frozenset(("GIF", "PNG", "WEBP", "AVIF", "TIFF"))
"""Formats that hold animations or pages; further images of others (MPO, PSD) are previews, views or layers."""
_RUN_PROGRAMS = frozenset(("EPS",))
"""Formats that Pillow decodes by starting a program (Ghostscript) with the file as its input."""
_opening = threading.Lock()


class MediaError(UserError):
    """An image that is absent or cannot be decoded: `path` and `reason`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class SourceUnavailable(MediaError):
    """A file that may not be read, which says nothing about what it holds."""


class StoreFailure(UserError):
    """A store that failed each time it was asked (overloaded, out of reach, a disk's error): no sample's fault.

    `path`: what was asked for; `attempts`: how often.
    """

    def __init__(self, path: str, attempts: int, reason: str) -> None:
        super().__init__(path, attempts, reason)
        self.path, self.attempts, self.reason = path, attempts, reason

    def __str__(self) -> str:
        tried = f"tried {self.attempts} times" if self.attempts > 1 else "while it was read"
        return (
            f"{self.path} cannot be read now ({tried}; {self.reason}): its storage fails, and no row is left out for "
            "it; look at the storage and the network, then run the same command, which goes on with what is done"
        )


class SourceChanged(MediaError):
    """A file that is not the one that was scanned any more."""


TRANSIENT = (SourceUnavailable, SourceChanged)
"""Errors that are not the content's: the next run tries again."""


def _windows_advice(path: str) -> str:
    """What to do about a path that only Windows knows; else nothing."""
    if "\\" not in path and not re.search(r"(^|/)[A-Za-z]:/", path):
        return ""
    return "; it is a path of Windows: write it with / and relative to --dataset_base_path"


def with_retries(path: str, read: Callable[[], T]) -> T:
    """What `read` returns, tried again where the storage fails.

    Raises MediaError, SourceUnavailable among them; StoreFailure when the last attempt fails too.
    """
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return read()
        except storage.MemberError as error:
            raise MediaError(path, str(error)) from error
        except (UserError, MemoryError):
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MediaError(path, f"no such file{_windows_advice(path)}") from error
        except IsADirectoryError as error:
            raise MediaError(path, "is a folder, not an image") from error
        except PermissionError as error:
            raise SourceUnavailable(path, f"may not be read ({error})") from error
        except ValueError as error:  # a name that no file can have
            raise MediaError(path, f"no such file ({error})") from error
        # Clients of object stores raise errors of their own.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _NO_NAMES:
                raise MediaError(path, f"no such file ({error.strerror})") from error
            if attempt == READ_ATTEMPTS:
                raise StoreFailure(path, attempt, f"{type(error).__name__}: {error}") from error
            logger.debug("%s: %s; trying again", path, error)
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("the last try returns or raises")


def fetch(path: str, stamp: str | None = None) -> bytes:
    """The whole file. Raises MediaError when it is absent, empty or may not be read, and StoreFailure.

    `stamp`: the file's, where it is known (see `storage.read_bytes`).
    """
    read = storage.read_bytes if stamp is None else partial(storage.read_bytes, stamp=stamp)
    return _checked(path, with_retries(path, lambda: read(path)))


def _checked(path: str, data: bytes) -> bytes:
    if not data:
        raise MediaError(path, "the file is empty (0 bytes)")
    if why := wrong_content(data[:HEAD]):
        raise MediaError(path, f"is {why}")
    return data


def fetch_stamped(path: str) -> tuple[bytes, str]:
    """The whole file and its stamp, which is not newer. Raises as `fetch`."""
    if not storage.is_remote(path):  # where asking costs little
        stamp = source_stamp(path)
        return fetch(path), stamp
    data, stamp = with_retries(path, lambda: storage.read_stamped(path))
    return _checked(path, data), stamp


def source_stamp(path: str) -> str:
    """`storage.stamp` of a source. Raises MediaError when it is absent or may not be read, and StoreFailure."""
    return with_retries(path, lambda: storage.stamp(path))


@contextmanager
def reading(path: str) -> Iterator[IO[bytes]]:
    """The open file, for what is too large to be read at once; what goes wrong becomes a MediaError or StoreFailure."""
    with with_retries(path, lambda: storage.open_input(path)) as file:
        if file.size() == 0:
            raise MediaError(path, "the file is empty (0 bytes)")
        watched = WatchedFile(cast("IO[bytes]", file))
        try:
            with decoding(path):
                if why := wrong_content(watched.read(HEAD)):
                    raise MediaError(path, f"is {why}")
                watched.seek(0)
                yield cast("IO[bytes]", watched)
        except MediaError as error:
            if watched.error is None:
                raise
            if isinstance(watched.error, PermissionError):
                raise SourceUnavailable(path, f"may not be read ({watched.error})") from error
            raise StoreFailure(path, 1, f"{type(watched.error).__name__}: {watched.error}") from error


@contextmanager
def decoding(path: str) -> Iterator[None]:
    """Within it, whatever a decoder raises becomes a MediaError with a readable reason."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise MediaError(path, "not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise MediaError(path, f"too large to decode: {error}") from error
    except PixelRangeError as error:
        raise MediaError(path, str(error)) from error
    # Pillow's decoders raise nearly anything on damaged files: SyntaxError, struct.error, zlib.error, IndexError …
    except Exception as error:
        raise MediaError(path, f"damaged or truncated ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class ImageInfo:
    """An image as `load_image` would return it: size in pixels; bytes of memory that decoding takes, until it is cut.

    `note`: what of the file is left aside ("its colour profile …"), or "".
    """

    width: int
    height: int
    decode_bytes: int
    note: str = ""


@contextmanager
def _opened(path: str, data: bytes | None) -> Iterator[tuple[Image.Image, bytes, str]]:
    """The image with its header read and its profile, the file, and what of its colours cannot be used ("" if nothing).

    Whatever goes wrong becomes a MediaError.
    """
    data = fetch(path) if data is None else data
    with decoding(path):
        Image.init()
        formats = [name for name in Image.ID if name not in _RUN_PROGRAMS]
        with _opening:
            # Pillow's limit counts pixels, is one for the process, and half of it only warns; ours counts bytes.
            pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(io.BytesIO(data), formats=formats)
            finally:
                Image.MAX_IMAGE_PIXELS = pillows
        with image:
            signalled, problem = signalled_profile(image, data)
            if signalled:
                image.info["icc_profile"] = signalled
            yield image, data, problem


def _orientation(image: Image.Image, data: bytes) -> int:
    """Orientation (1 to 8) by EXIF, or where that says nothing by XMP, from the header alone."""
    # Not image.getexif(): for PNG it decodes the pixels to look for EXIF behind them.
    exif = Image.Image.getexif(image)
    value = exif.get(_ORIENTATION_TAG)
    if value is None and image.format == "PNG" and (late := png_chunk(data, b"eXIf")):
        behind = Image.Exif()
        behind.load(b"Exif\0\0" + late)
        value = behind.get(_ORIENTATION_TAG)
    return value if value in _TURNS else 1


def _header(image: Image.Image, data: bytes) -> ImageHeader:
    return ImageHeader(
        image.format or "",
        image.mode,
        *image.size,
        file_bytes=len(data),
        progressive="progressive" in image.info or "progression" in image.info,
        turned=image.format == "TIFF" and _orientation(image, data) in _TURNS,
    )


def _first_of_several(image: Image.Image) -> str:
    """That a file has frames or pages beside the first, which alone is used; "" if it has none."""
    if image.format not in _SEQUENCES or not getattr(image, "is_animated", False):
        return ""
    return "it holds several frames or pages, of which the first was used"


def image_info(path: str, data: bytes | None = None) -> ImageInfo:
    """What the header alone tells. `data`: the file's bytes, where they have been read already. Raises MediaError."""
    with _opened(path, data) as (image, content, problem):
        turn = _orientation(image, content)
        # Pillow turns a TIFF itself; the size that it says is turned if the orientation is a tag, and not if it is XMP.
        swaps = turn in _SWAPS_SIDES and _ORIENTATION_TAG not in getattr(image, "tag_v2", ())
        width, height = image.size[::-1] if swaps else image.size
        notes = filter(None, (problem, profile_problem(image), _first_of_several(image)))
        return ImageInfo(width, height, _header(image, content).decode_bytes, "; ".join(notes))


def probe_image(path: str, data: bytes | None = None) -> tuple[int, int]:
    """(width, height) in pixels as `load_image` would return it, from the header alone. Raises MediaError."""
    found = image_info(path, data)
    return found.width, found.height


@contextmanager
def _decoded(
    path: str, data: bytes | None, max_bytes: int, *, whole: bool
) -> Iterator[tuple[Image.Image, PixelFormat, Image.Transpose | None]]:
    """The decoded image, how its file stores it, and how it is to be turned. whole: whether all of it is made RGB."""
    with _opened(path, data) as (image, content, _):
        header, size = _header(image, content), f"{image.width}x{image.height} pixels"
        check_decode_bytes(path, size, header.whole_bytes if whole else header.decode_bytes, max_bytes)
        turn = _TURNS.get(_orientation(image, content))
        stored = PixelFormat.of(image)
        turns_itself = image.format == "TIFF"
        image.load()
        yield image, stored, None if turns_itself else turn


def load_image(path: str, data: bytes | None = None, *, max_bytes: int = MAX_DECODE_BYTES) -> Image.Image:
    """The image as a viewer shows it, as RGB: upright, in sRGB, over white; the first frame of an animation.

    `data`: the file's bytes, where they have been read already. Raises MediaError, also for one whose decoding would
    take more than `max_bytes`.
    """
    with _decoded(path, data, max_bytes, whole=True) as decoded:
        return upright(*decoded)


def load_cut(
    path: str, data: bytes | None = None, *, height: int, width: int, max_bytes: int = MAX_DECODE_BYTES
) -> Image.Image:
    """`resize_crop` of `load_image`, pixel by pixel, without the whole image as RGB. Raises MediaError as that does."""
    with _decoded(path, data, max_bytes, whole=False) as decoded:
        return upright_cut(*decoded, height=height, width=width)


def check_decode_bytes(path: str, size: str, needed: int, limit: int) -> None:
    """Raise MediaError if decoding needs more than the limit, both in bytes."""
    if needed > limit:
        raise MediaError(
            path,
            f"to decode it ({size}) takes {needed / 2**30:.1f} GiB of memory, more than the limit of "
            f"{limit / 2**30:.1f} GiB; scale it down, or give --max_decode_memory {needed / 2**30 + 0.05:.1f}",
        )


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
