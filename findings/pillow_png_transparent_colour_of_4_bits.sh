#!/bin/bash
# Pillow 13.0.0: the transparent colour of a PNG of 4 bits matches no pixel.
#
# Guess: convert("RGBA") makes the pixels transparent that have the colour of the file's tRNS chunk, as browsers do.
# What happens: Pillow scales the pixels to 8 bits (4-bit grey 1 becomes 17), the transparent colour not (it stays 1), so
# no pixel matches, and the picture is opaque. The same for 2 bits. Of 1 and of 8 bits the guess holds.
# Seen: mode L, transparency 1, pixel after convert("RGBA") (17, 17, 17, 255).
. "$(dirname "$0")/lib.sh"
install pillow==13.0.0
run <<'P'
import struct, zlib
from io import BytesIO
from PIL import Image

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

def png(depth, key, pixel):
    """One grey pixel of a depth, with the transparent colour `key`."""
    header = struct.pack(">IIBBBBB", 1, 1, depth, 0, 0, 0, 0)
    row = bytes([0, pixel << (8 - depth)])
    body = chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", key)) + chunk(b"IDAT", zlib.compress(row))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")

seen = {depth: Image.open(BytesIO(png(depth, 1, 1))).convert("RGBA").getpixel((0, 0)) for depth in (1, 2, 4, 8)}
print(seen)
assert seen == {1: (255, 255, 255, 0), 2: (85, 85, 85, 255), 4: (17, 17, 17, 255), 8: (1, 1, 1, 0)}, seen
P
