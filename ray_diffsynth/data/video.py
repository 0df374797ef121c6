"""Videos by PyAV: what the header says, which frames are used, and those decoded and scaled, one at a time."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ray_diffsynth.data.formats import VIDEO_SUFFIXES
from ray_diffsynth.data.media import MediaError, reading, resize_crop
from ray_diffsynth.errors import UserError

Frames = npt.NDArray[np.uint8]
"""(frames, height, width, 3), RGB."""

# By quarter turns, counter-clockwise.
_TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


_TOLERANCE = 0.0005
"""Seconds: containers round the times of frames to a millisecond."""


class VideoSupportError(UserError):
    """Videos are to be read, and PyAV is not installed."""


@dataclass(frozen=True)
class VideoInfo:
    """A video as `load_frames` would return it: upright size, number of frames, frames per second."""

    width: int
    height: int
    num_frames: int
    fps: float


def is_video(path: str) -> bool:
    """Whether the name is that of a video or an animation."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def require_video_support(paths: Iterable[str]) -> None:
    """Raise VideoSupportError if one of `paths` is a video and PyAV is not there."""
    if importlib.util.find_spec("av") is None and (video := next(filter(is_video, paths), None)):
        raise VideoSupportError(f"{video} is a video, which is read by PyAV: pip install 'ray-diffsynth[video]'")


def available_frames(info: VideoInfo, fps: float | None) -> int:
    """Frames that the video gives at `fps`; None takes every frame in turn."""
    # Rounded before the floor: 2 s at 16 fps are 32 frames, not 31 by the last bit of a float.
    return info.num_frames if fps is None else max(math.floor(round(info.num_frames / info.fps * fps, 6)), 1)


def probe_video(path: str) -> VideoInfo:
    """Size, frames and rate, without decoding more than the first frame (which knows how it is turned).

    Containers that do not say how many frames they hold (webm, mkv) have their packets counted. Raises MediaError.
    """
    with _opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or Fraction(16)
        first = next(container.decode(stream), None)
        if first is None:
            raise MediaError(path, "holds no frame that decodes")
        width, height = first.width, first.height
        if _quarter_turns(first) % 2:
            width, height = height, width
        count = int(stream.frames)
    if count < 1:
        with _opened(path) as (container, stream):
            times = [packet.pts for packet in container.demux(stream) if packet.size]
            count, rate = len(times), _measured_rate(times, stream.time_base, rate)
    return VideoInfo(width, height, max(count, 1), float(rate))


def _measured_rate(times: Sequence[int | None], unit: Fraction, rate: Fraction) -> Fraction:
    """Frames per second on average by their times, where the header's `rate` is not about that."""
    known = [time for time in times if time is not None]
    seconds = (max(known) - min(known)) * unit if known else Fraction(0)
    if not seconds:
        return rate
    measured = (len(known) - 1) / seconds
    return rate if abs(measured / rate - 1) < 0.05 else Fraction(measured)


def load_frames(path: str, num_frames: int, height: int, width: int, *, fps: float | None = None) -> Frames:
    """The first `num_frames` frames, or those that are shown at 0, 1/fps, 2/fps … seconds, cut to `height` x `width`.

    A frame is shown from its own time on, whether or not frames follow at equal distances. Decoding ends with the last
    frame that is used, and of the source's frames two are in memory at a time. Raises MediaError, also when the file
    ends before its header says.
    """
    frames: Frames = np.empty((num_frames, height, width, 3), np.uint8)
    done = 0
    for frame, count in _shown(path, num_frames, fps):
        frames[done : done + count] = np.asarray(resize_crop(_picture(frame), height, width))
        done += count
    if done < num_frames:
        raise MediaError(path, f"ends after {done} of the {num_frames} frames that its header promises")
    return frames


def _shown(path: str, num_frames: int, fps: float | None) -> Iterator[tuple[Any, int]]:
    """The source's frames that make `num_frames` at `fps`, each with how often it is taken; fewer if the file ends."""
    if fps is None:
        yield from ((frame, 1) for frame in _decoded(path, last=num_frames - 1))
        return
    done, seen, start, last = 0, 0, 0.0, None
    for frame in _decoded(path):
        if frame.time is None:
            raise MediaError(path, "does not say when its frames are shown; leave --fps out")
        start = frame.time if last is None else start
        time, seen = frame.time - start, seen + 1
        # What is due before this frame is shown is the last one.
        due = min(math.ceil(round((time - _TOLERANCE) * fps, 6)), num_frames)
        if last is not None and due > done:
            yield last, due - done
            done = due
        if done == num_frames:
            return
        if done == num_frames - 1 and done / fps - time <= _TOLERANCE:  # those after it come later
            yield frame, 1
            return
        last = frame
    # The last frame stays to the end of the file, if that is its end.
    if last is not None and seen >= probe_video(path).num_frames:
        yield last, num_frames - done


def load_first_frame(path: str) -> Image.Image:
    """The first frame as an RGB picture in its own size. Raises MediaError."""
    for frame in _decoded(path, last=0):
        return _picture(frame)
    raise MediaError(path, "holds no frame that decodes")


def _decoded(path: str, *, last: int | None = None) -> Iterator[Any]:
    """The frames 0 … `last` (None: all) in the order in which they are shown; stops early if the file does."""
    with _opened(path) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            yield frame
            if index == last:
                return


def _picture(frame: Any) -> Image.Image:
    """A frame as an upright RGB picture, alpha laid over white."""
    if any(component.is_alpha for component in frame.format.components):
        above = Image.fromarray(frame.to_ndarray(format="rgba"))
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    else:
        picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _TURNS[_quarter_turns(frame)]
    return picture if turn is None else picture.transpose(turn)


def _quarter_turns(frame: Any) -> int:
    """Quarter turns, counter-clockwise, by which a phone wants its frames to be turned."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """The open container and its first video stream; whatever goes wrong becomes a MediaError."""
    require_video_support([path])
    import av

    with reading(path) as file, av.open(file) as container:
        if not container.streams.video:
            raise MediaError(path, "has no video stream")
        yield container, container.streams.video[0]
