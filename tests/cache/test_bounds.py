"""No cell takes memory that its bytes cannot fill, whatever it claims."""

from __future__ import annotations

import io
import json
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from ray_diffsynth.cache import bounds
from ray_diffsynth.cache.codec import CODECS, CodecError, decode_value, encode_value
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.schema import row_views, table_from_rows

HUGE = [(1 << 31, 1 << 31), (13_900_000_000,), (1 << 62,), (1 << 70, 2), (65536, 65536, 3), (2**16,) * 20]
NO_SHAPES: list[Any] = [(-1,), (-1, -3), (3, -1, -1), (1.5,), (True, 3), ("3",), (None,), (1,) * 100]
KINDS = ["uint8", "bfloat16", "float32", "complex128", "bool", "array:<f4", "array:<U7", "scalar:<f8", "pixels:RGB"]


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Buffers of a size that no test needs end the test instead of being taken."""
    allocate, pa_codec = pa.allocate_buffer, pa.Codec

    def checked(size: int, *args: Any, **options: Any) -> Any:
        assert size < 1 << 28, f"{size} bytes were asked for"
        return allocate(size, *args, **options)

    class Codec:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.real = pa_codec(*args, **options)

        def compress(self, *args: Any, **options: Any) -> Any:
            return self.real.compress(*args, **options)

        def decompress(self, data: Any, decompressed_size: int) -> Any:
            assert decompressed_size < 1 << 28, f"{decompressed_size} bytes were asked for"
            return self.real.decompress(data, decompressed_size)

    monkeypatch.setattr(pa, "allocate_buffer", checked)
    monkeypatch.setattr(pa, "Codec", Codec)
    tracemalloc.start()
    yield
    assert tracemalloc.get_traced_memory()[1] < 1 << 28
    tracemalloc.stop()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*HUGE, *NO_SHAPES], ids=str)
def test_claims_that_the_bytes_cannot_keep(kind: str, shape: Any, codec: str) -> None:
    for data in (b"", b"abc", encode_value(torch.zeros(3, dtype=torch.uint8), codec).data):
        with pytest.raises(CodecError):
            decode_value(data, shape, kind, codec)
        leaf = json.dumps({"leaf": [kind, list(shape), len(data)]}).encode()
        with pytest.raises(CodecError):
            decode_value(len(leaf).to_bytes(8, "little") + leaf + data, (), "tree", codec)


@pytest.mark.parametrize("codec", ["zstd", "planes-zstd"])
def test_a_shape_one_off(codec: str) -> None:
    stored = encode_value(torch.zeros(6, 7).half(), codec)
    for shape in ((6, 8), (6, 6), (43,), (0,)):
        with pytest.raises(CodecError):
            decode_value(stored.data, shape, "float16", codec)
    assert decode_value(stored.data, (7, 6), "float16", codec).shape == (7, 6)


def frame(content: int | None, blocks: list[tuple[int, int, bytes]]) -> bytes:
    """A zstd frame: (kind, size, bytes) a block."""
    head = (0xFD2FB528).to_bytes(4, "little")
    head += b"\x00\x58" if content is None else b"\xe0" + content.to_bytes(8, "little")
    for at, (kind, size, data) in enumerate(blocks):
        head += ((at == len(blocks) - 1) | kind << 1 | size << 3).to_bytes(3, "little") + data
    return head


def test_frames_that_lie() -> None:
    raw, repeated = (0, 3, b"abc"), (1, 1000, b"x")
    assert decode_value(frame(1003, [raw, repeated]), (1003,), "uint8", "zstd").tolist()[:4] == [97, 98, 99, 120]
    assert decode_value(frame(None, [raw, repeated]), (1003,), "uint8", "zstd").shape == (1003,)
    for data, size in (
        (frame(1 << 40, [raw]), 1 << 40),
        (frame(1 << 40, [raw]), 3),
        (frame(None, [raw]), 1 << 30),
        (frame(None, [raw, (1, 1 << 20, b"x")]), (1 << 20) + 3),
        (frame(3, [raw]) + frame(1 << 40, [raw]), (1 << 40) + 3),
        (frame(3, [raw])[:-1], 3),
        (frame(3, [(3, 3, b"abc")]), 3),
        (b"\x50\x2a\x4d\x18\x00\x00\x00\x00" + frame(3, [raw]), 3),
    ):
        with pytest.raises(CodecError):
            decode_value(data, (size,), "uint8", "zstd")


def test_what_is_true_but_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros shrink ten thousand times: a small file may hold much, and honestly says so."""
    zeros = torch.zeros(5000, dtype=torch.uint8)
    stored, twice = encode_value(zeros, "zstd"), encode_value([zeros, zeros], "zstd")
    image = encode_value(Image.new("RGB", (50, 50)), "zstd")
    monkeypatch.setattr(bounds, "MAX_VALUE_BYTES", 7499)
    assert decode_value(stored.data, stored.shape, stored.dtype, "zstd").shape == (5000,)
    for value in (twice, image):
        with pytest.raises(CodecError, match="beyond the 7,499"):
            decode_value(value.data, value.shape, value.dtype, "zstd")
    for codec in ("zstd", "planes-zstd"):
        with pytest.raises(
            CodecError, match=r"a float32 tensor of 8,000 bytes cannot be cached.*7,499 bytes; divide it"
        ):
            encode_value(torch.zeros(2000), codec)
    assert len(encode_value(torch.zeros(2000), "none").data) == 8000


def png(width: int, height: int, depth: int = 8, color: int = 2, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, color, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30_000, 30_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)])
@pytest.mark.parametrize(("depth", "color"), [(8, 2), (1, 0), (16, 6), (8, 3)])
def test_images_larger_than_their_bytes(size: tuple[int, int], depth: int, color: int) -> None:
    with pytest.raises(CodecError):
        decode_value(png(*size, depth, color), (), "png", "zstd")
    with pytest.raises(CodecError):
        decode_value(b"BM" + png(*size)[2:], (), "png", "zstd")


def test_images_of_every_depth_are_read() -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA", "I;16"):
        image = Image.new(mode, (300, 200)) if mode != "I;16" else Image.fromarray(np.zeros((200, 300), np.uint16))
        out = io.BytesIO()
        image.save(out, format="PNG", optimize=True)  # blank: as few bytes as can be
        assert decode_value(out.getvalue(), (), "png", "none").size == (300, 200)


@pytest.mark.parametrize(("kind", "shape"), [("pixels:RGB", (2, 2, 4)), ("pixels:RGB", (2, 2)), ("pixels:F", (2, 2, 4)),
                                             ("pixels:RGB", (-2, -2, 3)), ("pixels:", (2, 2, 3))])  # fmt: skip
def test_pixels_of_another_kind(kind: str, shape: Any) -> None:
    with pytest.raises(CodecError):
        decode_value(b"x" * 12, shape, kind, "none")


def test_leaves_that_use_bytes_twice() -> None:
    data = encode_value(torch.zeros(1000, dtype=torch.uint8), "none").data
    leaves = [["uint8", [1000], 1000], ["uint8", [], -1000], ["uint8", [1000], 1000]]
    header = json.dumps({"list": [{"leaf": leaf} for leaf in leaves]}).encode()
    for codec in CODECS:
        with pytest.raises(CodecError):
            decode_value(len(header).to_bytes(8, "little") + header + data, (), "tree", codec)


def test_a_value_without_a_shape() -> None:
    table = table_from_rows(["k"], [{"x": torch.ones(2)}], ("x",), "none")
    at = table.schema.get_field_index("x_shape")
    for shape in (None, [None]):
        damaged = table.set_column(at, table.schema.field(at), pa.array([shape], pa.list_(pa.int32())))
        with pytest.raises(CacheError, match="'x' of some row has no shape"):
            row_views(damaged)
