"""What decoding takes by the header, against what a process really grows by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.data.buckets import Bucket, SizeRule
from ray_diffsynth.data.decode_memory import ImageHeader, cut_bytes, kept_bytes
from ray_diffsynth.data.samples import decode_bytes
from ray_diffsynth.data.scan import SourceFile
from ray_diffsynth.data.spec import SampleSpec

SIDE, TARGET = 3000, 512
FACTOR = 2
"""The figure is at most this many times what is measured."""
SLACK = 6 << 20
"""Bytes by which a process may grow beside: libraries that are loaded by the first file of their kind."""
CONSTANT = 24 << 20
"""Bytes of a figure that do not depend on the image: its bands."""

MEASURE = """
import json, os, sys
from pathlib import Path
from PIL import Image
from ray_diffsynth.data.decode_memory import cut_bytes
from ray_diffsynth.data.media import image_info, load_cut

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

def measure(path):
    load_cut(f"{path}.small", height=16, width=16)  # its codec is loaded
    info = image_info(path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    load_cut(path, height=target, width=target)
    needed = info.decode_bytes + cut_bytes(info.width, info.height, target, target)
    return [needed, memory("VmHWM") - before]

Image.init()
target = int(sys.argv[1])
found = {}
for path in sys.argv[2:]:
    reader, writer = os.pipe()
    if os.fork() == 0:  # a process a file: what others left in this one's memory would be used again
        os.write(writer, json.dumps(measure(path)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        found[Path(path).name] = json.load(answer)
    os.wait()
print(json.dumps(found))
"""


def draw(folder: Path) -> list[Path]:
    """A file of each kind, and beside it a small one."""
    random = np.random.default_rng(0)
    blocks = np.kron(random.integers(0, 256, (SIDE // 20, SIDE // 20, 4), np.uint8), np.ones((20, 20, 1), np.uint8))
    rgba = Image.fromarray(blocks, "RGBA")
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    wide = np.asarray(grey).astype(np.uint16) * 257
    turned = Image.Exif()
    turned[0x0112] = 6
    plans: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "1.png": (grey.convert("1"), {}),
        "l.png": (grey, {}),
        "la.png": (rgba.convert("LA"), {}),
        "p.png": (rgb.quantize(32), {"transparency": 3}),
        "rgb.png": (rgb, {}),
        "rgba.png": (rgba, {}),
        "turned.png": (rgb, {"exif": turned}),
        "grey16.png": (Image.fromarray(wide), {}),
        "grey16.tif": (Image.fromarray(wide), {}),
        "grey32.tif": (Image.fromarray(wide.astype(np.int32)), {}),
        "turned.tif": (rgb, {"exif": turned, "compression": "tiff_lzw"}),
        "l.jpg": (grey, {}),
        "rgb.jpg": (rgb, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "progressive.jpg": (rgb, {"progressive": True, "subsampling": 0}),
        "progressive_cmyk.jpg": (rgb.convert("CMYK"), {"progressive": True}),
        "rgb.webp": (rgb, {"method": 0}),
        "rgba.webp": (rgba, {"lossless": True, "method": 0, "quality": 0}),
        "rgb.avif": (rgb, {"speed": 10}),
        "rgba.avif": (rgba, {"speed": 10}),
        "rgb.gif": (rgb, {}),
        "rgb.bmp": (rgb, {}),
        "l.jp2": (grey.resize((1500, 1500)), {}),
        "rgb.jp2": (rgb.resize((1500, 1500)), {}),
    }
    for name, (image, options) in plans.items():
        options = {**options, **({"compress_level": 1} if name.endswith("png") else {})}
        image.save(folder / name, **options)
        image.resize((64, 64)).save(
            folder / f"{name}.small", Image.registered_extensions()[Path(name).suffix], **options
        )
    return [folder / name for name in plans]


@pytest.mark.slow
def test_no_mode_takes_more_than_its_header_says(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(TARGET), *map(str, draw(tmp_path))]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: (needed, grown) for name, (needed, grown) in json.loads(done.stdout).items()}
    assert not {name: pair for name, pair in found.items() if pair[1] > pair[0] + SLACK}
    assert not {name: pair for name, pair in found.items() if pair[0] > FACTOR * pair[1] + CONSTANT}


def header(format: str, mode: str, **more: bool) -> int:
    return ImageHeader(format, mode, 10_000, 10_000, 1000, **more).decode_bytes


def test_wide_grey_takes_two_bytes_a_pixel_and_a_band() -> None:
    band = 24 << 20
    assert header("PNG", "I;16") == 1000 + 2 * 10**8 + band
    assert header("PNG", "RGB") == header("TIFF", "RGB") == 1000 + 4 * 10**8 + band
    assert header("JPEG", "RGB", progressive=True) == 1000 + 10 * 10**8
    assert header("TIFF", "RGB", turned=True) == 1000 + 8 * 10**8
    whole = ImageHeader("PNG", "RGB", 10_000, 10_000, 1000)
    assert whole.whole_bytes == whole.decode_bytes + 4 * 10**8
    strip = ImageHeader("PNG", "RGB", 1, 10**8, 1000)
    assert strip.decode_bytes == 1000 + 2 * 4 * 10**8 * 3.5, "one column is one band"


def test_what_is_made_of_an_image_by_its_target() -> None:
    assert cut_bytes(2000, 1000, 500, 500) == 4 * (1000 * 2500 + 500 * 500)
    assert kept_bytes(500, 400) == 500 * 400 * 9 and kept_bytes(500, 400, 81) == 81 * kept_bytes(500, 400)


def test_a_sample_takes_the_most_of_its_files_and_what_stays_of_all() -> None:
    large = SourceFile("a.png", "", 2000, 1000, "x", decode_bytes=10**7)
    small = SourceFile("b.png", "", 500, 500, "y", decode_bytes=10**6)
    spec = SampleSpec("", {"image": "a", "edit": "b"}, ("image", "edit"), SizeRule())
    peak, kept = decode_bytes({"image": [large], "edit": [small, small]}, Bucket(500, 500, images=2), spec)
    assert kept == 3 * kept_bytes(500, 500)
    assert peak == kept + 10**7 + cut_bytes(2000, 1000, 500, 500)
