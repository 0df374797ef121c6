#!/bin/bash
# PyAV 18.1.0: to_ndarray(format="rgb24") reads an HD video that names no matrix as BT.601.
#
# Guess: BT.709 from 720 lines on, as players and ffmpeg's documentation of untagged HD have it.
# What happens: BT.601, whatever the size: reds, greens and skin are off by a dozen levels. src_colorspace must be given.
# Seen: (200, 60, 30) comes back as (188, 47, 33); with src_colorspace="ITU709" as it was written.
. "$(dirname "$0")/lib.sh"
install "av==18.1.0" numpy==2.4.6
run <<'P'
import av
import numpy as np

red = np.array([200, 60, 30])
pixels = np.broadcast_to(red.astype(np.uint8), (720, 1280, 3)).copy()
frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv444p", dst_colorspace="ITU709")
frame = av.VideoFrame.from_ndarray(frame.to_ndarray(), format="yuv444p")  # as decoded from a file without a tag
print(frame.width, frame.height, "colorspace", frame.colorspace)
usual = frame.to_ndarray(format="rgb24")[360, 640].astype(int)
named = frame.to_ndarray(format="rgb24", src_colorspace="ITU709")[360, 640].astype(int)
print("by default", usual, "as BT.709", named)
assert abs(usual - red).max() > 8 and abs(named - red).max() <= 2
P
