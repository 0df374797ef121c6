"""Claim 11: decoding an image of 13000x13000 in 16 bits, by this build and by an earlier one, each in a process.

The peak of the process above what it has after its imports, until the image is cut to 1024x1024.
"""

from __future__ import annotations

import os
import statistics
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from benchmarks.harness import ROOT, Row, earlier_build, main

BEFORE = "dc813ee"
"""Commit of the earlier build."""
SIDE, TIMES = 13000, 3
TARGET = 0.9
"""GB."""
KINDS = {"grey": (0, 1), "RGB": (2, 3)}
"""What an image is -> PNG's colour type, channels."""

DECODE = """
import io, sys
from PIL import Image
from ray_diffsynth.data import media

def memory(what):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status", encoding="utf-8") if l.startswith(what))

file = io.BytesIO()
Image.new("RGB", (16, 16)).save(file, "PNG")
media.load_image("small", file.getvalue())
Image.MAX_IMAGE_PIXELS = None
before = memory("VmRSS")
if hasattr(media, "load_cut"):
    cut = media.load_cut(sys.argv[1], height=1024, width=1024)
else:
    cut = media.resize_crop(media.load_image(sys.argv[1]), 1024, 1024)
peak = memory("VmHWM") - before
import hashlib
print(peak, hashlib.sha256(cut.tobytes()).hexdigest())
"""


def draw(path: Path, kind: int, channels: int) -> Path:
    """A PNG of 16 bits a channel: a ramp from left to right in each row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + b"".join(struct.pack(">H", 5 * level) * channels for level in range(SIDE))
    packer = zlib.compressobj(1)
    rows = [packer.compress(row) for _ in range(SIDE)]
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 16, kind, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", b"".join([*rows, packer.flush()])) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def decoded(build: Path, image: Path) -> tuple[float, str]:
    """GB at the peak, and a hash of the pixels."""
    environment = {**os.environ, "PYTHONPATH": str(build)}
    command = [sys.executable, "-W", "ignore", "-c", DECODE, str(image)]
    done = subprocess.run(command, cwd=build, env=environment, text=True, capture_output=True, check=True)
    peak, pixels = done.stdout.split()
    return int(peak) / 1e9, pixels


def measure() -> list[Row]:
    root = Path(tempfile.mkdtemp(prefix="claim-11-"))
    rows = []
    with earlier_build(BEFORE) as old:
        for name, (kind, channels) in KINDS.items():
            image = draw(root / f"{name}.png", kind, channels)
            pairs = [(decoded(old, image), decoded(ROOT, image)) for _ in range(TIMES)]
            before, now = ([one[0] for one in side] for side in zip(*pairs, strict=True))
            details = {
                "before_gb": before,
                "now_gb": now,
                "file_kb": round(image.stat().st_size / 1e3),
                "same_pixels": len({pixels for pair in pairs for _, pixels in pair}) == 1,
            }
            rows.append(Row("11", f"GB to decode {SIDE}x{SIDE}, 16 bit {name}", max(now), "<=", TARGET, details))
            ratio = statistics.median(b / a for a, b in zip(before, now, strict=True))
            rows.append(Row("11", f"the same / by {BEFORE}, {name}", ratio, "<=", 0.6, {}))
    return rows


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
