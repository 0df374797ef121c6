"""Images have the colours that a viewer shows: profiles, depths, transparency, and the memory that they take."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from ray_diffsynth.data import bands
from ray_diffsynth.data.color import to_srgb
from ray_diffsynth.data.media import MediaError, image_info, load_image, probe_image

D50 = (0.9642, 1.0, 0.8249)


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (version 2) of a colour space, with these tags and those that every profile has."""
    name = b"made here\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz(*D50),
        **tags,
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        table += tag + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ ")
    head = (head + bytes(12) + b"acsp").ljust(68, b"\0") + struct.pack(">3i", *(round(v * 65536) for v in D50))
    return head.ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def matrix_profile(exponent: float = 2.2) -> bytes:
    """Adobe RGB's primaries."""
    curve = gamma(exponent)
    return profile(
        b"RGB ",
        {
            b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
            b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
            b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
            **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
        },
    )


def grey_profile(exponent: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": gamma(exponent)})


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def save(path: Path, image: Image.Image, **options: Any) -> str:
    image.save(path, **options)
    return str(path)


def pixel(path: str) -> tuple[int, ...]:
    found = load_image(path).getpixel((0, 0))
    assert isinstance(found, tuple)
    return found


def close(found: tuple[int, ...], wanted: tuple[int, ...], within: int = 2) -> bool:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= within


def png(
    width: int, depth: int, kind: int, row: bytes, *chunks: tuple[bytes, bytes], after: bool = False, height: int = 1
) -> bytes:
    """A PNG of one row: bits a channel, colour type, raw bytes; `chunks` before the pixels, or after them.

    `height`: what the header claims.
    """

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    more = b"".join(chunk(*one) for one in chunks)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + (pixels + more if after else more + pixels) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- profiles


def wanted(color: tuple[int, ...], icc: bytes, mode: str = "RGB") -> tuple[int, ...]:
    """By littleCMS alone."""
    image = Image.new(mode, (1, 1), color if len(color) > 1 else color[0])
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    shown = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert shown is not None
    found = shown.getpixel((0, 0))
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
def test_a_profile_is_converted_in_every_format(suffix: str, tmp_path: Path) -> None:
    icc, color = matrix_profile(), (40, 200, 60)
    options: dict[str, Any] = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    path = save(tmp_path / f"a.{suffix}", Image.new("RGB", (32, 32), color), icc_profile=icc, **options)
    assert not close(wanted(color, icc), color, 20), "the profile matters"
    assert close(pixel(path), wanted(color, icc), 6 if suffix in ("jpg", "avif") else 1)
    assert image_info(path).note == "" and "icc_profile" not in load_image(path).info


def test_grey_follows_its_profile(tmp_path: Path) -> None:
    icc = grey_profile(1.0)
    for image in (Image.new("L", (8, 8), 60), Image.new("LA", (8, 8), (60, 255))):
        path = save(tmp_path / f"{image.mode}.png", image, icc_profile=icc)
        assert close(pixel(path), wanted((60,), icc, "L"), 1) and pixel(path)[0] > 120, "linear light is lighter"
    wide = Image.fromarray(np.full((8, 8), 60 * 257, np.uint16))
    assert close(pixel(save(tmp_path / "wide.png", wide, icc_profile=icc)), wanted((60,), icc, "L"), 1)
    three = matrix_profile(1.0)
    path = save(tmp_path / "three.jpg", Image.new("L", (8, 8), 60), icc_profile=three, quality=100)
    assert close(pixel(path), wanted((60, 60, 60), three), 2) and image_info(path).note == ""


def test_palette_and_transparency_with_a_profile(tmp_path: Path) -> None:
    icc, color = matrix_profile(), (40, 200, 60)
    shown = wanted(color, icc)
    indexed = Image.new("P", (8, 8), 0)
    indexed.putpalette([*color, 0, 0, 0])
    assert close(pixel(save(tmp_path / "p.png", indexed, icc_profile=icc)), shown, 1)
    half = Image.new("RGBA", (8, 8), (*color, 128))
    over_white = tuple(round((value * 128 + 255 * 127) / 255) for value in shown)
    assert close(pixel(save(tmp_path / "rgba.png", half, icc_profile=icc)), over_white, 1), "white is not converted"


def test_cmyk_and_lab(tmp_path: Path) -> None:
    lab = Image.new("LAB", (8, 8), (128, 128, 128))
    assert close(pixel(save(tmp_path / "lab.tif", lab)), (119, 119, 119), 2), "L* 50"
    inks = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for suffix in ("tif", "jpg"):
        path = save(tmp_path / f"inks.{suffix}", inks, **({"quality": 100} if suffix == "jpg" else {}))
        assert close(pixel(path), (0, 255, 255), 3), "inks, whichever way round the file writes them"


def test_the_profile_of_srgb_changes_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(noise), icc_profile=SRGB)
    assert (np.asarray(load_image(path)) == noise).all()


@pytest.mark.parametrize(
    ("icc", "note"),
    [
        (b"no profile at all" * 20, "damaged"),
        (matrix_profile()[:200], "damaged|cannot be converted"),
        (grey_profile(1.0), "for GRAY, its pixels are RGB"),
        (profile(b"RGB ", {}), "cannot be converted"),
        (profile(b"CMYK", {}), "for CMYK"),
    ],
)
def test_a_profile_that_cannot_be_used_is_left_aside_and_said(icc: bytes, note: str, tmp_path: Path) -> None:
    for suffix in ("png", "tif"):
        path = save(tmp_path / f"a.{suffix}", Image.new("RGB", (8, 8), (40, 200, 60)), icc_profile=icc)
        assert pixel(path) == (40, 200, 60)
        assert re.search(note, image_info(path).note), image_info(path).note


# ---------------------------------------------------------------- transparency and depth

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize(
    ("depth", "kind", "row", "key", "second"),
    [
        (16, 0, struct.pack(">HH", 1000, 30000), struct.pack(">H", 1000), (117, 117, 117)),
        (16, 2, struct.pack(">6H", 300, 600, 900, 0, 0, 65535), struct.pack(">3H", 300, 600, 900), (0, 0, 255)),
        (8, 0, bytes([7, 9]), struct.pack(">H", 7), (9, 9, 9)),
        (8, 2, bytes([1, 2, 3, 0, 0, 255]), struct.pack(">3H", 1, 2, 3), (0, 0, 255)),
        (4, 0, bytes([0x13]), struct.pack(">H", 1), (51, 51, 51)),
        (2, 0, bytes([0b01100000]), struct.pack(">H", 1), (170, 170, 170)),
        (1, 0, bytes([0b01000000]), struct.pack(">H", 0), WHITE),
        (16, 4, struct.pack(">4H", 0, 0, 0, 65535), None, BLACK),
        (16, 6, struct.pack(">8H", 9, 9, 9, 0, 65535, 0, 0, 65535), None, (255, 0, 0)),
    ],
)
def test_a_transparent_colour_is_white_at_every_depth(
    depth: int, kind: int, row: bytes, key: bytes | None, second: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(2, depth, kind, row, *([(b"tRNS", key)] if key is not None else [])))
    image = load_image(str(path))
    assert image.getpixel((0, 0)) == WHITE and image.getpixel((1, 0)) == second


def test_modes_that_only_some_formats_have() -> None:
    def shown(image: Image.Image) -> tuple[int, ...]:
        found = to_srgb(image).getpixel((0, 0))
        assert isinstance(found, tuple)
        return found

    clear = Image.new("LA", (2, 2), (0, 0))
    assert shown(clear) == shown(clear.convert("La")) == WHITE
    assert shown(Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert("RGBa")) == WHITE
    for mode in ("YCbCr", "HSV", "RGBX"):
        assert close(shown(Image.new("RGB", (2, 2), (200, 40, 40)).convert(mode)), (200, 40, 40), 3)
    assert shown(Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert("PA")) == WHITE


@pytest.mark.parametrize("suffix", ["webp", "gif", "png", "avif", "tif"])
def test_alpha_of_every_format_lies_over_white(suffix: str, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (8, 0, 16, 16))
    clear.paste((255, 0, 0, 255), (0, 15, 1, 16))
    animated = {"save_all": True, "append_images": [clear.rotate(90)]} if suffix in ("webp", "gif", "png") else {}
    options = {**animated, **({"lossless": True} if suffix == "webp" else {})}
    image = load_image(save(tmp_path / f"a.{suffix}", clear, **options))
    left, right = image.getpixel((2, 2)), image.getpixel((13, 13))
    assert isinstance(left, tuple) and isinstance(right, tuple)
    assert close(left, WHITE, 3) and close(right, (255, 0, 0), 6)


def tiff_grey(levels: list[int], bits: int, photometric: int) -> bytes:
    """A TIFF of one row of packed grey."""
    packed = int("".join(f"{level:0{bits}b}" for level in levels), 2).to_bytes(len(levels) * bits // 8, "big")
    if bits == 16:
        packed = struct.pack(f"<{len(levels)}H", *levels)
    entries = [(256, len(levels)), (257, 1), (258, bits), (259, 1), (262, photometric)]
    entries += [(273, 8), (277, 1), (278, 1), (279, len(packed))]
    body = packed + bytes(len(packed) % 2)
    head = b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(entries))
    return head + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + bytes(4)


@pytest.mark.parametrize(
    ("bits", "photometric", "levels", "shown"),
    [(16, 1, [0, 65535], [0, 255]), (16, 0, [0, 65535], [255, 0]), (12, 1, [0, 4095], [0, 255])],
)
def test_grey_of_more_than_eight_bits(
    bits: int, photometric: int, levels: list[int], shown: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff_grey(levels, bits, photometric))
    image = load_image(str(path))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(value,) * 3 for value in shown]


def test_wide_grey_is_scaled_in_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (37, 50), np.uint16)
    path = save(tmp_path / "a.png", Image.fromarray(levels))
    right = np.rint(levels / 257).astype(np.uint8)
    assert (np.asarray(load_image(path))[..., 0] == right).all()
    monkeypatch.setattr(bands, "BAND_PIXELS", 100)
    assert (np.asarray(load_image(path))[..., 0] == right).all()


def test_16_bits_a_colour_do_not_wrap(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 257, dtype=">u2")
    row = np.stack([ramp, ramp[::-1], np.full_like(ramp, 65535)], -1).astype(">u2").tobytes()
    path = tmp_path / "a.png"
    path.write_bytes(png(256, 16, 2, row))
    found = np.asarray(load_image(str(path)))[0]
    assert (found[:, 0] == np.arange(256)).all() and (found[:, 1] == np.arange(255, -1, -1)).all()
    assert (found[:, 2] == 255).all()


def test_orientation_behind_the_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    path = tmp_path / "a.png"
    path.write_bytes(png(2, 8, 0, bytes([10, 200]), (b"eXIf", content), after=True))
    assert probe_image(str(path)) == (1, 2)
    image = load_image(str(path))
    assert image.size == (1, 2) and image.getpixel((0, 0)) == (10, 10, 10)


def test_header_and_result_agree(tmp_path: Path) -> None:
    """Also where only XMP tells how the image is turned."""
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    image = Image.new("RGB", (20, 10))
    for suffix, options in {"jpg": {"xmp": xmp}, "webp": {"xmp": xmp}, "tif": {"tiffinfo": {700: xmp}}}.items():
        path = save(tmp_path / f"a.{suffix}", image, **options)
        assert probe_image(path) == load_image(path).size == (10, 20), suffix


# ---------------------------------------------------------------- memory


def test_a_small_file_that_claims_a_huge_image_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png(60000, 8, 2, b"", height=60000))
    assert image_info(str(path)).decode_bytes > 60000 * 60000 * 4 and probe_image(str(path)) == (60000, 60000)
    monkeypatch.setattr(Image.Image, "load", lambda *given: pytest.fail("its pixels are allocated"))
    with pytest.raises(MediaError, match=r"60000x60000.*takes 26\.8 GiB.*limit of 4\.0 GiB.*--max_decode_memory 26\.9"):
        load_image(str(path))


def test_the_limit_counts_bytes_not_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own limit does not hold here, and holds elsewhere."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = save(tmp_path / "a.png", Image.new("RGB", (64, 64)))
    assert load_image(path).size == (64, 64) and Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    needed = image_info(path).decode_bytes + 64 * 64 * 4
    assert load_image(path, max_bytes=needed).size == (64, 64)
    with pytest.raises(MediaError, match="--max_decode_memory"):
        load_image(path, max_bytes=needed - 1)


def test_formats_that_start_a_program_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(MediaError, match="not an image that Pillow can read"):
        load_image(str(path))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif", "tiff"])
def test_what_follows_the_first_frame_or_page_is_named(suffix: str, tmp_path: Path) -> None:
    red, green = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "green")
    several = save(tmp_path / f"several.{suffix}", red, save_all=True, append_images=[green])
    assert "of which the first was used" in image_info(several).note
    assert close(pixel(several), (255, 0, 0), 6)
    assert image_info(save(tmp_path / f"one.{suffix}", red)).note == ""
