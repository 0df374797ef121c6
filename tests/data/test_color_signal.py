"""Colours that a file names by numbers are shown as those that it names by a profile."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ray_diffsynth.data.color_signal import signalled_profile
from ray_diffsynth.data.media import MediaError, image_info, load_image
from tests.data.test_shown import close, matrix_profile, png, wanted

COLOR = (100, 200, 50)
P3_TO_SRGB = np.array([[1.2249402, -0.2249402, 0], [-0.0420570, 1.0420570, 0], [-0.0196376, -0.0786361, 1.0982737]])
"""Linear Display P3 to linear sRGB (CSS Color 4, sample code)."""
BT2020_TO_SRGB = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
)
"""Linear BT.2020 to linear sRGB (ITU-R BT.2087)."""


def linear(color: tuple[int, ...]) -> np.ndarray:
    v = np.array(color) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def shown(light: np.ndarray) -> tuple[int, ...]:
    light = light.clip(0, 1)
    return tuple(
        (np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055) * 255).round().astype(int)
    )


def written(path: Path, *chunks: tuple[bytes, bytes], color: tuple[int, ...] = COLOR) -> str:
    kind = 2 if len(color) == 3 else 0
    path.write_bytes(png(4, 8, kind, bytes(color) * 4, *chunks))
    return str(path)


def pixel(path: str) -> tuple[int, ...]:
    found = load_image(path).getpixel((1, 0))
    assert isinstance(found, tuple)
    return found


def gama(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(value * 100_000))


def chrm(*values: float) -> tuple[bytes, bytes]:
    """White, red, green, blue."""
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in values))


SRGB_CORNERS = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
P3_CORNERS = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)


@pytest.mark.parametrize(
    ("codes", "to_srgb"),
    [((12, 13), P3_TO_SRGB), ((9, 13), BT2020_TO_SRGB), ((1, 13), np.eye(3)), ((1, 1), np.eye(3)), ((2, 2), np.eye(3))],
)
def test_coding_points_of_png(codes: tuple[int, int], to_srgb: np.ndarray, tmp_path: Path) -> None:
    color = (120, 130, 110)
    path = written(tmp_path / "a.png", (b"cICP", bytes([*codes, 0, 1])), color=color)
    assert close(pixel(path), shown(to_srgb @ linear(color)), 1)
    assert image_info(path).note == ""


@pytest.mark.parametrize("value", [1.0, 1 / 1.8, 1 / 2.6])
def test_gamma_of_png(value: float, tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", gama(value))
    assert close(pixel(path), shown((np.array(COLOR) / 255) ** (1 / value)), 1)
    grey = written(tmp_path / "grey.png", gama(value), color=(90,))
    assert close(pixel(grey), shown((np.full(3, 90) / 255) ** (1 / value)), 1)


def test_chromaticities_of_png(tmp_path: Path) -> None:
    color = (120, 130, 110)
    path = written(tmp_path / "a.png", gama(1 / 2.2), chrm(*P3_CORNERS), color=color)
    assert close(pixel(path), shown(P3_TO_SRGB @ linear(color)), 1)


@pytest.mark.parametrize(
    "chunks",
    [[gama(1 / 2.2)], [gama(1 / 2.2), chrm(*SRGB_CORNERS)], [gama(1.0), (b"sRGB", b"\0")], [chrm(*SRGB_CORNERS)]],
)
def test_what_stands_for_srgb_changes_no_bit(chunks: list[tuple[bytes, bytes]], tmp_path: Path) -> None:
    row = np.random.default_rng(0).integers(0, 256, (32, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(png(32, 8, 2, row.tobytes(), *chunks))
    assert np.array_equal(np.asarray(load_image(str(tmp_path / "a.png")))[0], row)


def iccp(profile: bytes) -> tuple[bytes, bytes]:
    return b"iCCP", b"p\0\0" + zlib.compress(profile)


def test_which_of_several_counts(tmp_path: Path) -> None:
    """Coding points before a profile, that before sRGB, that before gamma."""
    profile = matrix_profile()
    srgb = written(tmp_path / "a.png", (b"cICP", bytes([1, 13, 0, 1])), iccp(profile))
    assert pixel(srgb) == COLOR
    assert close(pixel(written(tmp_path / "b.png", iccp(profile), gama(1.0))), wanted(COLOR, profile), 1)
    beside_hdr = written(tmp_path / "c.png", (b"cICP", bytes([9, 16, 0, 1])), iccp(profile))
    assert close(pixel(beside_hdr), wanted(COLOR, profile), 1) and image_info(beside_hdr).note == ""


@pytest.mark.parametrize(
    ("chunk", "note"),
    [
        ((b"cICP", bytes([9, 16, 0, 1])), r"HDR colours \(PQ\) were not converted"),
        ((b"cICP", bytes([9, 18, 0, 1])), r"HDR colours \(HLG\)"),
        (gama(200.0), "gamma of 200"),
        (chrm(0.3127, 0.329, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3), "enclose nothing"),
    ],
)
def test_what_cannot_be_used_is_said(chunk: tuple[bytes, bytes], note: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", chunk)
    assert re.search(note, image_info(path).note)
    assert pixel(path) == COLOR


def avif(codes: tuple[int, int] | None, embedded: bytes = b"") -> bytes:
    """An AVIF whose `colr` box names these codes; Pillow writes one with those of sRGB."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), COLOR).save(file, "AVIF", quality=100, subsampling="4:4:4", icc_profile=embedded)
    data = file.getvalue()
    if codes is None:
        return data
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", *codes) + data[at + 4 :]


def test_coding_points_of_avif(tmp_path: Path) -> None:
    plain = tmp_path / "plain.avif"
    plain.write_bytes(avif(None))
    assert close(pixel(str(plain)), COLOR, 2)
    stored = pixel(str(plain))
    wide = tmp_path / "wide.avif"
    wide.write_bytes(avif((12, 13)))
    assert close(pixel(str(wide)), shown(P3_TO_SRGB @ linear(stored)), 2)
    hdr = tmp_path / "hdr.avif"
    hdr.write_bytes(avif((9, 16)))
    assert "HDR colours (PQ)" in image_info(str(hdr)).note
    profile = matrix_profile()
    both = tmp_path / "both.avif"
    both.write_bytes(avif(None, profile))
    assert close(pixel(str(both)), wanted(stored, profile), 3)


def test_a_camera_that_says_adobe_rgb_without_a_profile(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03", 2: b"0100"}
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 16), COLOR).save(path, quality=100, exif=exif)
    assert "Adobe RGB without a colour profile" in image_info(str(path)).note
    Image.new("RGB", (16, 16), COLOR).save(path, quality=100, exif=exif, icc_profile=matrix_profile())
    assert image_info(str(path)).note == ""


def test_the_profile_of_display_p3_is_apples(tmp_path: Path) -> None:
    """Red, green and blue as in the profile that Apple gives out (rounded to its 16 bits), of one that was computed."""
    path = Path(written(tmp_path / "a.png", (b"cICP", bytes([12, 13, 0, 1]))))
    with Image.open(path) as image:
        profile, problem = signalled_profile(image, path.read_bytes())
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
    assert problem == ""
    for found, known in (
        (opened.red_colorant, (0.515121, 0.241196, -0.001053)),
        (opened.green_colorant, (0.291977, 0.692245, 0.041885)),
        (opened.blue_colorant, (0.157104, 0.066574, 0.784073)),
    ):
        assert np.allclose(found[0], known, atol=2e-4)


def test_a_range_that_nobody_knows_is_no_damage(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(MediaError, match="a.tif: floating-point pixels have no known range; save as 8 or 16 bits"):
        load_image(str(tmp_path / "a.tif"))
