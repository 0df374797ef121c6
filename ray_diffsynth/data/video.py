"""Videos by PyAV: what the header says, which frames are used, and those decoded and scaled, one at a time."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator
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


def frame_indices(info: VideoInfo, num_frames: int, fps: float) -> list[int]:
    """Which frames of the file make `num_frames` at `fps`, from its start; some repeat where `fps` is higher."""
    return [min(round(index * info.fps / fps), info.num_frames - 1) for index in range(num_frames)]


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
            count = sum(1 for packet in container.demux(stream) if packet.size)
    return VideoInfo(width, height, max(count, 1), float(rate))


def load_frames(path: str, num_frames: int, height: int, width: int, *, fps: float | None = None) -> Frames:
    """The first `num_frames` frames at `fps`, each cut to `height` x `width` as soon as it is decoded.

    Decoding ends with the last frame that is used, and of the source's frames one is in memory at a time.
    Raises MediaError, also when the file ends before its header says.
    """
    wanted = range(num_frames) if fps is None else frame_indices(probe_video(path), num_frames, fps)
    frames: Frames = np.empty((num_frames, height, width, 3), np.uint8)
    done = 0
    for index, frame in enumerate(_decoded(path, last=wanted[-1])):
        if wanted[done] != index:
            continue
        frames[done] = np.asarray(resize_crop(_picture(frame), height, width))
        done += 1
        while done < num_frames and wanted[done] == index:  # shown longer than a frame of the source
            frames[done] = frames[done - 1]
            done += 1
    if done < num_frames:
        raise MediaError(path, f"ends after {done} of the {num_frames} frames that its header promises")
    return frames


def load_first_frame(path: str) -> Image.Image:
    """The first frame as an RGB picture in its own size. Raises MediaError."""
    for frame in _decoded(path, last=0):
        return _picture(frame)
    raise MediaError(path, "holds no frame that decodes")


def _decoded(path: str, *, last: int) -> Iterator[Any]:
    """The frames 0 … `last` in the order in which they are shown; stops early if the file does."""
    with _opened(path) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            yield frame
            if index >= last:
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
