"""Clips drawn for tests, in the containers and codecs that datasets come in."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

CODECS = {".mp4": ("libx264", "yuv420p"), ".mov": ("libx264", "yuv420p"), ".webm": ("libvpx-vp9", "yuv420p")}
CODECS |= {".mkv": ("libx264", "yuv420p"), ".gif": ("gif", "rgb8")}
STEP = 20
"""Frame i is the grey value i * STEP, with a red left edge."""


def drawn_frame(index: int, height: int, width: int) -> np.ndarray[Any, Any]:
    frame = np.full((height, width, 3), index * STEP % 256, np.uint8)
    frame[:, : width // 4] = (255, 0, 0)
    return frame


def draw_clip(
    path: Path,
    frames: int = 11,
    *,
    height: int = 48,
    width: int = 64,
    rate: int = 16,
    rotation: int = 0,
    times: Sequence[int] = (),
) -> Path:
    """Write a clip; `rotation` is how a phone marks that its frames are to be turned (degrees, counter-clockwise).

    times: milliseconds at which the frames are shown, instead of at `rate`.
    """
    import av

    codec, pixels = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
            # Frames in the order in which they are shown: else the header of an mp4 tells a shorter duration.
            stream.options = {"bf": "0"} if codec == "libx264" else {}
        for index in range(frames):
            picture = av.VideoFrame.from_ndarray(drawn_frame(index, height, width), format="rgb24")
            if times:
                picture.pts, picture.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def grey(frame: np.ndarray[Any, Any]) -> int:
    """The index that a decoded frame shows, by the grey of its right edge."""
    return round(float(frame[:, -4:].mean()) / STEP)
