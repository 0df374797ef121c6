"""Every value comes back as it was, to the bit."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_diffsynth.cache.codec import _PART, CODECS, CodecError, Encoded, decode_value, encode_value
from ray_diffsynth.errors import UserError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e8m0fnu, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.complex128),
]
codecs = st.sampled_from(CODECS)


def back(value: Any, codec: str) -> Any:
    encoded = encode_value(value, codec)
    return decode_value(encoded.data, encoded.shape, encoded.dtype, codec)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


@settings(max_examples=150)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 2**32), codecs)
def test_tensors_of_every_dtype_to_the_bit(dtype: torch.dtype, shape: list[int], seed: int, codec: str) -> None:
    # random bits: NaN payloads, infinities and denormals among them
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(seed))  # fmt: skip
    tensor = raw.view(dtype).reshape(shape)
    assert_same(back(tensor, codec), tensor)


def test_planes_are_merged_in_parts() -> None:
    for count in (_PART - 1, _PART, _PART + 1, 2 * _PART + 3):
        words = torch.randint(-(2**15), 2**15, (count,), dtype=torch.int16)
        assert_same(back(words, "planes-zstd"), words)


@pytest.mark.parametrize("codec", CODECS)
def test_layouts_of_a_tensor(codec: str) -> None:
    base = torch.randn(4, 6, dtype=torch.bfloat16)
    for tensor in (base.t(), base[::2, 1::3], base[0, 0], base.expand(2, 4, 6), base[:0], torch.nn.Parameter(base)):
        assert_same(back(tensor, codec), tensor)
    wave = torch.randn(3, dtype=torch.complex64).conj()
    assert (back(wave, codec) == wave).all()
    decoded = back(base, codec)
    decoded += 1  # the reader's own memory, writable
    assert not decoded.requires_grad


ARRAYS = [
    np.arange(12, dtype=">f4").reshape(3, 4)[::-1],
    np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    np.array(7.5, dtype=np.float16),
    np.array([True, False]),
    np.zeros((0, 3), dtype=np.complex64),
    np.array([2**64 - 1], dtype=np.uint64),
    np.array(["a", "öß\U0001f600"]),
    np.array([b"a", b"bc"]),
    np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8),
]
SCALARS = [np.float32(0.1), np.float64(0.1), np.int64(3), np.uint8(255), np.bool_(True), np.str_("a"), np.complex64(1j)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_a_numpy_array_stays_one(array: np.ndarray[Any, Any], codec: str) -> None:
    for found in (back(array, codec), back([array], codec)[0]):
        assert type(found) is np.ndarray
        assert found.dtype == array.dtype and found.dtype.str == array.dtype.str and found.shape == array.shape
        assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: type(scalar).__name__)
def test_a_numpy_scalar_stays_one(scalar: np.generic, codec: str) -> None:
    for found in (back(scalar, codec), back({"a": (scalar,)}, codec)["a"][0]):
        assert type(found) is type(scalar) and found == scalar


def test_an_array_is_the_readers_own() -> None:
    for codec in CODECS:
        found = back(np.arange(4), codec)
        found += 1  # writable
        assert found.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([object()]), "numpy array of dtype object"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "numpy array of dtype .*'a'"),
        (np.array(["2024-01-01"], dtype="datetime64[D]"), "numpy array of dtype datetime64"),
        (np.datetime64("2024-01-01"), "numpy scalar of dtype datetime64"),
        (np.ma.masked_array([1, 2], [True, False]), "numpy.ma.*MaskedArray cannot be cached"),
        ({1, 2}, "builtins.set cannot be cached"),
        (b"bytes", "builtins.bytes cannot be cached"),
        (torch.Size([1]), "a Size cannot be cached"),
        (torch.float32, "dtype cannot be cached"),
        ({1: "a"}, "text keys"),
    ],
)
def test_what_would_not_come_back_as_it_is_is_refused(value: Any, message: str) -> None:
    for nested in (value, [value], {"a": (1, value)}):
        with pytest.raises(CodecError, match=message):
            encode_value(nested)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2,), "array:<f4"), ((3,), "array:O"), ((), "array:|V4"), ((-1,), "array:<f4"), ((2,), "scalar:x")],
)
def test_a_damaged_array(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(CodecError):
        decode_value(b"1234", shape, dtype, "none")


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(plain, codecs)
def test_plain_values(value: Any, codec: str) -> None:
    encoded = encode_value(value, codec)
    assert encoded.dtype == "json"
    result = decode_value(encoded.data, encoded.shape, encoded.dtype, codec)
    assert result == value and repr(result) == repr(value)


def test_special_floats_and_surrogates() -> None:
    assert math.isnan(back(math.nan, "zstd")) and back(-math.inf, "zstd") == -math.inf
    assert str(back(-0.0, "zstd")) == "-0.0" and back("\ud800", "zstd") == "\ud800"


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return type(left) is type(right) and left == right


leaves = plain | st.integers(0, 9).map(lambda n: torch.arange(n, dtype=torch.bfloat16))
nested = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(nested, codecs)
def test_nested_values(value: Any, codec: str) -> None:
    assert same(back(value, codec), value)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_images(mode: str, codec: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (7, 5, 3), np.uint8)
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 251) if mode == "I;16" else image.convert(mode)
    result = back(image, codec)
    assert result.mode == mode and result.size == (5, 7) and result.tobytes() == image.tobytes()
    assert result.getpalette() == image.getpalette()
    (listed,) = back([image], codec)
    assert listed.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "builtins.object cannot be cached"),
        ({1, 2}, "builtins.set cannot be cached"),
        (b"bytes", "builtins.bytes cannot be cached"),
        ({1: "x"}, "a dict cannot be cached; use plain"),
        ([object()], "builtins.object"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.empty(2, device="meta"), "on meta"),
        (Image.new("F", (2, 2)), "mode F"),
    ],
)
def test_what_cannot_be_stored_is_named(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode_value(value)


def test_unknown_codec_and_dtype() -> None:
    with pytest.raises(CodecError, match="use one of planes-zstd, zstd, none"):
        encode_value(1, "gzip")
    with pytest.raises(CodecError, match="newer version"):
        decode_value(b"1234", (4,), "float3", "none")


@pytest.mark.parametrize(
    "header",
    [
        '"leaf"',
        "1",
        "null",
        "[]",
        "{}",
        '{"list": 1}',
        '{"list": ["leaf"]}',
        '{"dict": [1]}',
        '{"dict": {"a": 1}}',
        '{"leaf": []}',
        '{"leaf": [1, 2, 3]}',
        '{"leaf": ["int8", "ab", 2]}',
        '{"leaf": ["int8", [1.5], 2]}',
        '{"leaf": ["int8", [-2], 2]}',
        f'{{"leaf": ["int8", [{2**70}], 2]}}',
        f'{{"leaf": ["int16", [2], {2**70}]}}',
        '{"leaf": ["int8", [2], -9]}',
        '{"leaf": ["tree", [], 2]}',
        '{"other": []}',
        "[" * 9000,
    ],
)
def test_a_damaged_header_of_a_nesting(header: str) -> None:
    data = len(header).to_bytes(8, "little") + header.encode() + b"ab"
    for codec in CODECS:
        with pytest.raises(CodecError):
            decode_value(data, (), "tree", codec)


@settings(max_examples=200)
@given(st.data())
def test_damage_raises_nothing_but_codec_error(data: st.DataObject) -> None:
    codec = data.draw(codecs)
    value = data.draw(st.sampled_from([torch.randn(50).bfloat16(), torch.randn(9), "text", [torch.ones(3), (1,)],
                                       Image.new("RGB", (9, 9))]))  # fmt: skip
    encoded = encode_value(value, codec)
    damaged = bytearray(encoded.data)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    else:
        for _ in range(3):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CodecError):
        decode_value(bytes(damaged), encoded.shape, encoded.dtype, codec)


@pytest.mark.parametrize("side", [32, 64, 128])
def test_planes_shrink_bfloat16_latents(side: int) -> None:
    latents = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(0)).bfloat16()
    raw = latents.numel() * 2
    assert len(encode_value(latents).data) < 0.705 * raw < len(encode_value(latents, "zstd").data)
    assert encode_value(latents, "none") == Encoded(bits(latents), (1, 16, side, side), "bfloat16")
