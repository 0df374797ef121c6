"""One video stream by PyAV, its frames as a player shows them: square pixels, upright, in sRGB, over white."""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import numpy as np
from PIL import Image

from ray_diffsynth.data.media import MAX_DECODE_BYTES, MediaError, check_decode_bytes, reading
from ray_diffsynth.data.suffixes import VIDEO_SUFFIXES
from ray_diffsynth.errors import UserError

# Signs of a display matrix (a b / c d), which takes x, y to a*x + c*y, b*x + d*y, y downwards.
_TURNS = {
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave out the alpha that WebM keeps beside the frames."""
# ITU-T H.273, as FFmpeg numbers them.
_UNSPECIFIED = 2
_PQ, _HLG = 16, 18
_WIDE_PRIMARIES = (9, 11, 12)
"""BT.2020 and P3."""
_SRGB_CURVE, _SRGB_PRIMARIES = 13, 1

_DEMUXERS = (
    *("mov", "matroska", "webm", "avi", "gif", "mpeg", "mpegvideo", "mpegts", "m4v", "h264", "hevc", "ivf", "asf"),
    *("flv", "ogg", "mxf", "dv", "rm", "nut", "apng", "png_pipe", "jpeg_pipe", "webp_pipe"),
)
"""FFmpeg's names of formats whose files hold their frames. A playlist or script (concat, HLS, DASH) names other files
or addresses, which would be read in its place, whatever its name ends in."""

_KEPT_FRAMES = 8
"""Frames that a decoder keeps to refer to, of up to 4 bytes a pixel."""

_converters = threading.local()
"""A converter for each thread: one for HDR takes two seconds to set up, and is kept while the format stays."""


class VideoSupportError(UserError):
    """Videos are to be read, and PyAV is not installed."""


def is_video(path: str) -> bool:
    """Whether the name is that of a video or an animation."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def require_video_support(paths: Iterable[str]) -> None:
    """Raise VideoSupportError if one of `paths` is a video and PyAV is not there."""
    if importlib.util.find_spec("av") is None and (video := next(filter(is_video, paths), None)):
        raise VideoSupportError(f"{video} is a video, which is read by PyAV: pip install 'ray-diffsynth[video]'")


@dataclass(frozen=True)
class ShownFrame:
    """A decoded frame and what is needed to show it. `aspect`: width of a pixel by its height."""

    frame: Any
    aspect: Fraction

    @property
    def pts(self) -> int | None:
        """Presentation time in units of the stream (`VideoStream.unit`); None where the file has none."""
        return self.frame.pts  # type: ignore[no-any-return]

    @property
    def time(self) -> float | None:
        """Seconds from which on it is shown."""
        return self.frame.time  # type: ignore[no-any-return]

    @property
    def damaged(self) -> bool:
        """Whether the decoder had to invent parts of it."""
        return bool(self.frame.is_corrupt)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) with square pixels, upright. Pixels are stretched, none shrunk, as browsers do."""
        width, height = self._square
        turned = _turn(self.frame) in (
            Image.Transpose.ROTATE_90,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.TRANSVERSE,
        )
        return (height, width) if turned else (width, height)

    @property
    def _square(self) -> tuple[int, int]:
        width, height = self.frame.width, self.frame.height
        if self.aspect >= 1:
            return round(width * self.aspect), height
        return width, round(height / self.aspect)

    def image(self) -> Image.Image:
        """RGB, in its `size`."""
        transparent = self.frame.format.has_palette or any(part.is_alpha for part in self.frame.format.components)
        converted = _converter().reformat(
            self.frame, format="rgba" if transparent else "rgb24", **_conversion(self.frame)
        )
        image = Image.fromarray(converted.to_ndarray())
        if transparent:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        if image.size != self._square:
            image = image.resize(self._square, Image.Resampling.BILINEAR)
        turn = _turn(self.frame)
        return image if turn is None else image.transpose(turn)


def _converter() -> Any:
    if not hasattr(_converters, "one"):
        from av.video.reformatter import VideoReformatter

        _converters.one = VideoReformatter()
    return _converters.one


def _conversion(frame: Any) -> dict[str, Any]:
    """The converter's options for a frame's colours: matrix and range, and curve and primaries of HDR."""
    options: dict[str, Any] = {}
    if not frame.format.is_rgb and frame.colorspace == _UNSPECIFIED:
        # What players take where the file does not say: BT.709 from high definition on.
        options["src_colorspace"] = "ITU709" if frame.width >= 1280 or frame.height > 576 else "ITU601"
    if frame.color_trc in (_PQ, _HLG):
        options |= {"dst_color_trc": _SRGB_CURVE, "dst_color_primaries": _SRGB_PRIMARIES}
    elif frame.color_primaries in _WIDE_PRIMARIES:
        options |= {"dst_color_trc": frame.color_trc, "dst_color_primaries": _SRGB_PRIMARIES}
    return options


def _turn(frame: Any) -> Image.Transpose | None:
    """How a phone wants its frames to be turned or mirrored: the nearest right angle."""
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return None
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        b = c = 0
    else:
        a = d = 0
    return _TURNS.get((_sign(a), _sign(b), _sign(c), _sign(d)))


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


class VideoStream:
    """The first video stream of an open container.

    `skipped` and `lost`: packets before the first frame that the container hides (an edit list), and that the decoder
    could not use; known once a frame was decoded.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self._container = container
        self._stream = stream
        self.skipped = self.lost = 0

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) of its frames in the file."""
        return self._stream.codec_context.width, self._stream.codec_context.height

    @property
    def decode_bytes(self) -> int:
        """Memory that decoding takes, beside what becomes of the frames: those that the decoder keeps, and copies."""
        width, height = self.stored_size
        aspect = self._aspect()
        return width * height * 4 * (_KEPT_FRAMES + 3 + math.ceil(2 * max(aspect, 1 / aspect)))

    @property
    def rate(self) -> Fraction:
        """Frames per second by the header."""
        return Fraction(self._stream.average_rate or self._stream.guessed_rate or 16)

    @property
    def unit(self) -> Fraction:
        """Seconds of one step of a packet's time."""
        return Fraction(self._stream.time_base)

    @property
    def count(self) -> int:
        """Frames by the header; 0 where it does not say."""
        return int(self._stream.frames)

    def times(self) -> list[int | None]:
        """The time of every frame, from the packets alone."""
        return [packet.pts for packet in self._container.demux(self._stream) if packet.size]

    def frames(self) -> Iterator[ShownFrame]:
        """All frames in the order in which they are shown."""
        aspect = self._aspect()
        decoder = self._alpha_decoder()
        first: int | None = None
        early: list[Any] = []
        for packet in self._container.demux(self._stream):
            if first is None and packet.size:
                early.append((packet.pts, packet.is_discard))
            for frame in packet.decode() if decoder is None else decoder.decode(packet):
                if first is None:
                    first = frame.pts or 0
                    missed = [hidden for time, hidden in early if time is not None and time < first]
                    self.skipped, self.lost = sum(missed), len(missed) - sum(missed)
                yield ShownFrame(frame, aspect)

    def _aspect(self) -> Fraction:
        aspect = Fraction(self._stream.sample_aspect_ratio or 1)
        return aspect if aspect > 0 else Fraction(1)

    def _alpha_decoder(self) -> Any:
        """A decoder that keeps the transparency, where the stream's own would not."""
        import av

        name = _ALPHA_DECODERS.get(self._stream.codec_context.name)
        tags = {key.lower(): value for key, value in self._stream.metadata.items()}
        if name is None or tags.get("alpha_mode") != "1" or name not in av.codecs_available:
            return None
        return av.CodecContext.create(name, "r")


def _container(path: str, file: IO[bytes]) -> Any:
    import av

    try:
        return av.open(file, options={"format_whitelist": ",".join(_DEMUXERS)})
    except av.ArgumentError as error:  # FFmpeg's answer for a format that is not in the list
        raise MediaError(
            path, "is of a format that is not read (a playlist names other files); save it as MP4"
        ) from error


def _is_cover(stream: Any) -> bool:
    """Whether it is an image that stands for the file, of an album say, which players do not show as a video."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


@contextmanager
def opened(path: str, max_bytes: int = MAX_DECODE_BYTES) -> Iterator[VideoStream]:
    """The first video stream of a file; whatever goes wrong within becomes a MediaError.

    So does a size by whose header decoding would take more than `max_bytes` of memory.
    """
    require_video_support([path])
    with reading(path) as file, _container(path, file) as container:
        moving = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not moving:
            raise MediaError(path, "has no video stream")
        video = VideoStream(container, moving[0])
        check_decode_bytes(path, "frames of {}x{} pixels".format(*video.stored_size), video.decode_bytes, max_bytes)
        yield video
