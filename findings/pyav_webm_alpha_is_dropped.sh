#!/bin/bash
# PyAV 18.1.0: decoding a WebM with transparency gives opaque frames, with the colours that were hidden.
#
# Guess: container.decode() gives yuva420p, since the stream's metadata has alpha_mode=1.
# What happens: FFmpeg's own vp9 decoder, which comes first, ignores the alpha; libvpx's, asked for by name, gives it.
# Seen: alpha_mode 1; by default {'yuv420p'}, by libvpx-vp9 {'yuva420p'}.
. "$(dirname "$0")/lib.sh"
install "av==18.1.0" numpy==2.4.6
run <<'P'
import av
import numpy as np

with av.open("a.webm", "w") as out:
    stream = out.add_stream("libvpx-vp9", rate=8)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuva420p"
    for at in range(4):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[:, :32] = (255, 0, 0, 255)  # the right half is transparent
        frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="yuva420p")
        frame.pts = at
        out.mux(stream.encode(frame))
    out.mux(stream.encode())

with av.open("a.webm") as file:
    mode = file.streams.video[0].metadata.get("alpha_mode")
    usual = {frame.format.name for frame in file.decode(video=0)}
with av.open("a.webm") as file:
    libvpx = av.CodecContext.create("libvpx-vp9", "r")
    named = {frame.format.name for packet in file.demux(video=0) for frame in libvpx.decode(packet)}
print("alpha_mode", mode, usual, named)
assert mode == "1" and usual == {"yuv420p"} and named == {"yuva420p"}
P
