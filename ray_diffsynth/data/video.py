"""Videos by PyAV: what the header says, which frames are used, and those decoded and scaled, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from PIL import Image

from ray_diffsynth.data.bands import resize_crop
from ray_diffsynth.data.media import MAX_DECODE_BYTES, MediaError
from ray_diffsynth.data.video_stream import ShownFrame, opened

Frames = npt.NDArray[np.uint8]
"""(frames, height, width, 3), RGB."""


_TOLERANCE = 0.0005
"""Seconds: containers round the times of frames to a millisecond."""


@dataclass(frozen=True)
class VideoInfo:
    """A video as it is shown: upright size with square pixels, number of frames, frames per second."""

    width: int
    height: int
    num_frames: int
    fps: float
    decode_bytes: int = 0
    """Memory that decoding takes beside the frames that are made."""
    note: str = ""
    """What of the file is left aside, or ""."""


def available_frames(info: VideoInfo, fps: float | None) -> int:
    """Frames that the video gives at `fps`; None takes every frame in turn."""
    # Rounded before the floor: 2 s at 16 fps are 32 frames, not 31 by the last bit of a float.
    return info.num_frames if fps is None else max(math.floor(round(info.num_frames / info.fps * fps, 6)), 1)


def probe_video(path: str, *, max_bytes: int = MAX_DECODE_BYTES) -> VideoInfo:
    """Size, frames and rate, without decoding more than the first frame (which knows how it is turned).

    Frames before the first that can be decoded are not counted, and named. Containers that do not say how many frames
    they hold (webm, mkv) have their packets counted. Raises MediaError, also for frames that would take more than
    `max_bytes` of memory.
    """
    with opened(path, max_bytes) as video:
        first = next(video.frames(), None)
        if first is None:
            raise MediaError(path, "holds no frame that decodes")
        count, rate, lost, missing = video.count, video.rate, video.lost, video.lost + video.skipped
        decode_bytes = video.decode_bytes
    if count < 1:
        with opened(path, max_bytes) as video:
            times = video.times()
            count, rate = len(times), _measured_rate(times, video.unit, rate)
    width, height = first.size
    note = f"its first {lost} frames cannot be decoded and were left out" if lost else ""
    return VideoInfo(width, height, max(count - missing, 1), float(rate), decode_bytes, note)


def _measured_rate(times: Sequence[int | None], unit: Fraction, rate: Fraction) -> Fraction:
    """Frames per second on average by their times, where the header's `rate` is not about that."""
    known = [time for time in times if time is not None]
    seconds = (max(known) - min(known)) * unit if known else Fraction(0)
    if not seconds:
        return rate
    measured = (len(known) - 1) / seconds
    return rate if abs(measured / rate - 1) < 0.05 else Fraction(measured)


def load_frames(
    path: str,
    num_frames: int,
    height: int,
    width: int,
    *,
    fps: float | None = None,
    max_bytes: int = MAX_DECODE_BYTES,
) -> Frames:
    """The first `num_frames` frames, or those that are shown at 0, 1/fps, 2/fps … seconds, cut to `height` x `width`.

    A frame is shown from its own time on, whether or not frames follow at equal distances. Decoding ends with the last
    frame that is used, and of the source's frames two are in memory at a time. Raises MediaError, also when the file
    ends before its header says, or would take more than `max_bytes` of memory.
    """
    frames: Frames = np.empty((num_frames, height, width, 3), np.uint8)
    done = 0
    for frame, count in _shown(path, num_frames, fps, max_bytes):
        frames[done : done + count] = np.asarray(resize_crop(frame.image(), height, width))
        done += count
    if done < num_frames:
        raise MediaError(path, f"ends after {done} of the {num_frames} frames that its header promises")
    return frames


def _shown(path: str, num_frames: int, fps: float | None, max_bytes: int) -> Iterator[tuple[ShownFrame, int]]:
    """The source's frames that make `num_frames` at `fps`, each with how often it is taken; fewer if the file ends."""
    if fps is None:
        yield from ((frame, 1) for frame in _decoded(path, max_bytes, last=num_frames - 1))
        return
    done, seen, start, last = 0, 0, 0.0, None
    for frame in _decoded(path, max_bytes):
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
    if last is not None and seen >= probe_video(path, max_bytes=max_bytes).num_frames:
        yield last, num_frames - done


def load_first_frame(path: str, *, max_bytes: int = MAX_DECODE_BYTES) -> Image.Image:
    """The first frame as RGB in its own size. Raises MediaError; `max_bytes` as in `load_frames`."""
    for frame in _decoded(path, max_bytes, last=0):
        return frame.image()
    raise MediaError(path, "holds no frame that decodes")


def _decoded(path: str, max_bytes: int, *, last: int | None = None) -> Iterator[ShownFrame]:
    """The frames 0 … `last` (None: all) in the order in which they are shown; stops early if the file does."""
    with opened(path, max_bytes) as video:
        for index, frame in enumerate(video.frames()):
            if frame.damaged:
                raise MediaError(path, f"its frame {index + 1} is damaged")
            yield frame
            if index == last:
                return
