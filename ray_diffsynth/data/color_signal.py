"""The colours that a file names by numbers instead of a profile: PNG's cICP, gAMA and cHRM, AVIF's nclx.

They become an ICC profile, so that all that is true of an embedded profile is true of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image

_D65 = (0.3127, 0.3290)
_PRIMARIES: dict[int, tuple[float, ...]] = {
    1: (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, *_D65),  # BT.709, sRGB
    5: (0.640, 0.330, 0.290, 0.600, 0.150, 0.060, *_D65),  # BT.601 of 625 lines
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *_D65),  # BT.601 of 525 lines
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *_D65),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *_D65),  # BT.2020
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),  # DCI-P3
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *_D65),  # Display P3
}
"""Code of ITU-T H.273, table 2 -> x and y of red, green, blue and white."""

_HDR = {16: "PQ", 18: "HLG"}
_Curve = Callable[[np.ndarray], np.ndarray]
_CURVES: dict[int, _Curve] = {
    4: lambda v: v**2.2,
    5: lambda v: v**2.8,
    8: lambda v: v,
    13: lambda v: np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4),
}
"""Code of ITU-T H.273, table 3 -> linear light of a signal in [0, 1]. BT.709's curve and its kin (1, 6, 14, 15) are
cameras'; viewers show them as sRGB, and so are codes that stand for nothing (2)."""
_POINTS = 1024
"""Entries of a curve in a profile."""


def signalled_profile(image: Image.Image, data: bytes) -> tuple[bytes, str]:
    """An ICC profile of what the file says of its colours beside a profile, empty if that is sRGB or nothing; and why
    it could not be made, for people. From the header alone; `data` is the file.
    """
    embedded = bool(image.info.get("icc_profile"))
    if image.format == "PNG":
        return _of_png(image, data, embedded)
    if image.format == "AVIF" and not embedded and (found := _nclx(data)):
        return _of_codes(*found)
    if image.format == "JPEG" and not embedded and _says_adobe_rgb(image):
        return b"", "its EXIF says Adobe RGB without a colour profile; it was read as sRGB"
    return b"", ""


def png_chunk(data: bytes, kind: bytes, *, before: bytes = b"") -> bytes:
    """Content of the first chunk of a kind, wherever it stands or `before` a chunk of that kind; empty for none."""
    place = 8
    while place + 8 <= len(data):
        length, found = struct.unpack_from(">I4s", data, place)
        if found == before:
            break
        if found == kind:
            return data[place + 8 : place + 8 + length]
        place += 12 + length
    return b""


def _of_png(image: Image.Image, data: bytes, embedded: bool) -> tuple[bytes, str]:
    """cICP goes before a profile, that before sRGB, that before gAMA and cHRM (PNG, third edition, 12.2.1)."""
    codes = png_chunk(data, b"cICP", before=b"IDAT")  # its place; the pixels may be thousands of chunks
    if len(codes) == 4 and not (embedded and codes[1] in _HDR):  # the profile beside HDR is for those without it
        return _of_codes(codes[0], codes[1])
    if embedded or image.info.get("srgb") is not None:
        return b"", ""
    gamma, corners = image.info.get("gamma"), image.info.get("chromaticity")
    if not gamma and not corners:
        return b"", ""
    # Pillow gives white first.
    places = (*corners[2:], *corners[:2]) if corners else _PRIMARIES[1]
    if corners and not _is_triangle(places):
        return b"", "its primary colours (cHRM) enclose nothing and were not used"
    if gamma and not 0.01 <= gamma <= 10:
        return b"", f"its gamma of {gamma:g} (gAMA) cannot be meant and was not used"
    # 1/2.2 is what writers put for sRGB, which has no exponent.
    exponent = 1 / gamma if gamma and abs(gamma - 1 / 2.2) >= 0.005 else None
    return _profile(tuple(places), 13 if exponent is None else exponent), ""


def _says_adobe_rgb(image: Image.Image) -> bool:
    """DCF's mark of a camera that wrote Adobe RGB, which few viewers heed."""
    return Image.Image.getexif(image).get_ifd(ExifTags.IFD.Interop).get(1) == "R03"


def _of_codes(primaries: int, curve: int) -> tuple[bytes, str]:
    if curve in _HDR:
        return b"", f"its HDR colours ({_HDR[curve]}) were not converted to sRGB; save it as SDR"
    return _profile(_PRIMARIES.get(primaries, _PRIMARIES[1]), curve if curve in _CURVES else 13), ""


def _nclx(data: bytes) -> tuple[int, int] | None:
    """(primaries, curve) of the first `colr` box with codes in an AVIF's `meta`; an item's properties lie in `ipco`."""
    meta = _box(data, b"meta")
    for properties in _boxes(_box(_box(meta[4:], b"iprp"), b"ipco"), b"colr"):
        if properties[:4] == b"nclx" and len(properties) >= 8:
            primaries, curve = struct.unpack_from(">HH", properties, 4)
            return primaries, curve
    return None


def _box(data: bytes, kind: bytes) -> bytes:
    return next(iter(_boxes(data, kind)), b"")


def _boxes(data: bytes, kind: bytes) -> list[bytes]:
    """Contents of the boxes of a kind (ISO 14496-12, 4.2) side by side in `data`."""
    found, place = [], 0
    while place + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        head = 8
        if size == 1 and place + 16 <= len(data):
            size, head = struct.unpack_from(">Q", data, place + 8)[0], 16
        end = place + size if size else len(data)
        if end < place + head:
            break
        if name == kind:
            found.append(data[place + head : end])
        place = end
    return found


def _is_triangle(places: Sequence[float]) -> bool:
    rx, ry, gx, gy, bx, by, wx, wy = places
    return abs((gx - rx) * (by - ry) - (bx - rx) * (gy - ry)) > 1e-4 and min(ry, gy, by, wy) > 1e-4


@lru_cache(maxsize=32)
def _profile(places: tuple[float, ...], curve: float) -> bytes:
    """An ICC profile (version 2, matrix and curves). `places`: x and y of red, green, blue, white; `curve`: a code of
    `_CURVES` (int), or an exponent (float).

    Red, green and blue stand for XYZ of their own, adapted to D50 after Bradford, as profiles
    want it (ICC.1:2001-04, annex A).
    """
    corners = np.array(places).reshape(4, 2)
    xyz = np.stack([corners[:, 0] / corners[:, 1], np.ones(4), (1 - corners.sum(1)) / corners[:, 1]])
    rgb = xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])
    rgb = _adapted(xyz[:, 3]) @ rgb
    signal = np.linspace(0, 1, _POINTS)
    light = _CURVES[curve](signal) if isinstance(curve, int) else signal**curve
    table = b"curv\0\0\0\0" + struct.pack(">I", _POINTS) + (light * 65535).round().astype(">u2").tobytes()
    tags = {
        b"wtpt": _xyz(_D50),
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 1) + b"\0" * 79,
        b"cprt": b"text\0\0\0\0\0",
    }
    tags |= {name: _xyz(rgb[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), table)
    return _icc(tags)


_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def _adapted(white: np.ndarray) -> np.ndarray:
    """The matrix that takes XYZ under `white` to XYZ under D50."""
    scale = np.diag(_BRADFORD @ _D50 / (_BRADFORD @ white))
    return np.asarray(np.linalg.inv(_BRADFORD) @ scale @ _BRADFORD)


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _icc(tags: dict[bytes, bytes]) -> bytes:
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"\0" * 4, 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + _xyz(_D50)[8:] + b"\0" * 48
    return head + struct.pack(">I", len(tags)) + table + body
