"""One value <-> bytes, shape and dtype: what a cell of the cache holds. Lossless; data only, never code.

Kinds, told apart by the `dtype` string:

- a torch dtype's name (`bfloat16`, `float8_e4m3fn`, `bool` …): a tensor, little-endian, compressed as the codec says;
- `json`: None, bool, int, float, str, and lists and dicts (string keys) of these;
- `array:<numpy dtype>` (`array:<f4`): a numpy array; `scalar:<numpy dtype>`: a numpy number; bytes compressed likewise;
- `png`: an image; `pixels:<mode>`: an image uncompressed, with codec `none` (between processes);
- `tree`: lists, tuples and dicts that hold tensors or images: a JSON header, then the leaves one after another.

`planes-zstd` compresses the low and the high bytes of 16-bit tensors apart, as two zstd frames one behind the other:
the high bytes (sign, exponent) of Gaussian bfloat16 latents shrink to about 0.37 of their size, the mantissa bytes
hardly. In one frame both would share the statistics of a block (128 KiB), and small latents would only shrink to 0.76.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from ray_diffsynth.cache import bounds
from ray_diffsynth.errors import UserError

CODECS = ("planes-zstd", "zstd", "none")
ZSTD_LEVEL = 1
JSON, PNG, PIXELS, TREE, ARRAY, SCALAR = "json", "png", "pixels:", "tree", "array:", "scalar:"

_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
_PART = 1 << 17
"""Words of which the planes are merged at a time."""
_DAMAGED = (
    *(ValueError, OSError, LookupError, TypeError, AttributeError, ArithmeticError, SyntaxError, RuntimeError),
    *(pa.ArrowException, Image.DecompressionBombError),
)
"""Damaged bytes show as whatever the decoder of the kind raises: JSONDecodeError, ArrowInvalid, OverflowError …"""
_NUMPY_DTYPE = re.compile(r"[|<>](b1|[iuf][1248]|c8|c16|[SU][1-9][0-9]{0,5})")
"""Of arrays: truth values, numbers and text; no objects, no records, nothing whose size is the machine's."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_PIXEL_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}

Buffer: TypeAlias = bytes | bytearray | memoryview | pa.Buffer


class CodecError(UserError, ValueError):
    """A value that cannot be stored, or bytes that do not decode to what their shape and dtype say."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A stored value: see the module. `shape` is that of a tensor or of pixels (h, w, channels), else empty."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str


def check_codec(codec: str) -> None:
    """Raises CodecError for an unknown codec."""
    if codec not in CODECS:
        raise CodecError(f"cache codec {codec!r} is unknown; use one of {', '.join(CODECS)}")


def _zstd() -> pa.Codec:
    return pa.Codec("zstd", compression_level=ZSTD_LEVEL)


def _is_plain(value: Any) -> bool:
    """Whether JSON gives `value` back as it is: exact types only (True is no int, a tuple is no list)."""
    if value is None or type(value) in (bool, int, float, str):
        return True
    if type(value) is list:
        return all(_is_plain(item) for item in value)
    return type(value) is dict and all(type(key) is str and _is_plain(item) for key, item in value.items())


def encode_value(value: Any, codec: str = "planes-zstd") -> Encoded:
    """Store a tensor (comes back on the CPU), numpy array or number, plain value, image or nesting of these.

    Raises CodecError naming the type that cannot be stored.
    """
    check_codec(codec)
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, codec)
    if type(value) is np.ndarray or isinstance(value, np.generic):
        return _encode_array(value, codec)
    if isinstance(value, Image.Image):
        return _encode_image(value, codec)
    if _is_plain(value):
        try:
            return Encoded(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), (), JSON)
        except UnicodeEncodeError:
            # A lone surrogate has no UTF-8; JSON's escapes can hold it.
            return Encoded(json.dumps(value, separators=(",", ":")).encode(), (), JSON)
    if isinstance(value, list | tuple | dict):
        return _encode_tree(value, codec)
    raise CodecError(
        f"a {type(value).__module__}.{type(value).__qualname__} cannot be cached; units may hand on tensors, numpy "
        "arrays, PIL images, text, numbers, None, and lists, tuples and dicts of these"
    )


def decode_value(data: Buffer, shape: tuple[int, ...] | list[int], dtype: str, codec: str) -> Any:
    """The value that `encode_value` stored. Raises CodecError when the bytes do not fit shape and dtype.

    No more memory is taken than the bytes can fill, and of compressed ones MAX_VALUE_BYTES.
    """
    check_codec(codec)
    view = memoryview(data)
    try:
        _value_bytes(view, shape, dtype, codec)
        if dtype == JSON:
            return json.loads(bytes(view))
        if dtype == TREE:
            return _decode_tree(view, codec)
        if dtype == PNG:
            with Image.open(io.BytesIO(view), formats=("PNG",)) as image:
                image.load()
                return image.copy()
        if dtype.startswith(PIXELS):
            return Image.frombytes(dtype.removeprefix(PIXELS), (shape[1], shape[0]), bytes(view))
        if dtype.startswith((ARRAY, SCALAR)):
            return _decode_array(view, tuple(shape), dtype, codec)
        return _decode_tensor(view, tuple(shape), dtype, codec)
    except CodecError:
        raise
    except _DAMAGED as error:
        raise CodecError(f"{len(view)} bytes do not decode as {dtype} {shape} ({codec}): {error}") from error


def _value_bytes(view: memoryview, shape: tuple[int, ...] | list[int], dtype: str, codec: str) -> int:
    """What the value will take, about. Raises CodecError or ValueError when the bytes cannot give it."""
    if dtype in (JSON, TREE):
        return len(view)
    if dtype == PNG:
        return bounds.png_bytes(view)
    if dtype.startswith(PIXELS):
        channels = _PIXEL_CHANNELS.get(dtype.removeprefix(PIXELS))
        if len(shape) != 3 or shape[2] != channels:
            raise CodecError(f"{dtype} {shape} is no kind of image that is stored")
    size = bounds.array_bytes(shape, 1 if dtype.startswith(PIXELS) else _itemsize(dtype))
    if not size or codec == "none" or dtype.startswith(PIXELS):
        if size != len(view):
            raise CodecError(f"{len(view)} bytes stand for a {dtype} value of shape {shape}, which has {size}")
    else:
        bounds.check_zstd(view, size)
    return size


def _itemsize(dtype: str) -> int:
    """Bytes of an element. Raises CodecError for an unknown dtype."""
    kind, _, name = dtype.rpartition(":")
    if f"{kind}:" in (ARRAY, SCALAR) and _NUMPY_DTYPE.fullmatch(name):
        return np.dtype(name).itemsize
    if dtype not in _DTYPES:
        raise CodecError(f"dtype {dtype!r} is unknown; the cache was written by a newer version, or is damaged")
    return _DTYPES[dtype].itemsize


def as_cached(row: Mapping[str, Any], codec: str = "planes-zstd") -> dict[str, Any]:
    """A row of parameters as it comes back from a cache; for tests of units. Raises CodecError, as `encode_value`."""
    stored = {name: encode_value(value, codec) for name, value in row.items()}
    return {name: decode_value(each.data, each.shape, each.dtype, codec) for name, each in stored.items()}


def _encode_array(value: np.ndarray[Any, Any] | np.generic, codec: str) -> Encoded:
    """As the tensor of its bytes."""
    if not _NUMPY_DTYPE.fullmatch(value.dtype.str):
        what = "numpy array" if isinstance(value, np.ndarray) else "numpy scalar"
        raise CodecError(f"a {what} of dtype {value.dtype} cannot be cached; only numbers and text can")
    kind = ARRAY if isinstance(value, np.ndarray) else SCALAR
    raw = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.nbytes else torch.empty(0)
    return Encoded(_encode_tensor(raw, codec).data, tuple(value.shape), kind + value.dtype.str)


def _decode_array(view: memoryview, shape: tuple[int, ...], name: str, codec: str) -> Any:
    kind, _, dtype = name.partition(":")
    found = np.dtype(dtype)
    raw = _decode_tensor(view, (bounds.array_bytes(shape, found.itemsize),), "uint8", codec)
    array = raw.numpy().view(found).reshape(shape)
    return array if f"{kind}:" == ARRAY else array[()]


def _has_planes(dtype: torch.dtype, codec: str) -> bool:
    return codec == "planes-zstd" and dtype.itemsize == 2


def _encode_tensor(tensor: torch.Tensor, codec: str) -> Encoded:
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise CodecError(f"a {tensor.layout} {name} tensor on {tensor.device} cannot be cached; make it a dense one")
    try:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        raw = plain.reshape(-1).view(torch.uint8).numpy()
    except RuntimeError as error:
        raise CodecError(f"a tensor of dtype {name} cannot be cached: {error}") from error
    if codec != "none" and raw.size > bounds.MAX_VALUE_BYTES:
        most = f"{bounds.MAX_VALUE_BYTES:,} bytes"
        raise CodecError(f"a {name} tensor of {raw.size:,} bytes cannot be cached, only one of up to {most}; divide it")
    if codec == "none" or not raw.size:
        data = raw.tobytes()
    elif _has_planes(tensor.dtype, codec):
        words = raw.view("<u2")
        # astype keeps the low byte of each word, and runs three times as fast as a strided copy
        planes = (words.astype(np.uint8), (words >> 8).astype(np.uint8))
        data = b"".join(_zstd().compress(plane, asbytes=True) for plane in planes)
    else:
        data = _zstd().compress(raw, asbytes=True)
    return Encoded(data, tuple(tensor.shape), name)


def _decode_tensor(view: memoryview, shape: tuple[int, ...], name: str, codec: str) -> torch.Tensor:
    dtype = _DTYPES[name]
    size = bounds.array_bytes(shape, dtype.itemsize)
    if not size:
        return torch.empty(shape, dtype=dtype)
    raw: Any = view if codec == "none" else _zstd().decompress(view, decompressed_size=size)
    if len(raw) != size:
        raise CodecError(f"{len(raw)} bytes stand for a {name} tensor of shape {list(shape)}, which has {size}")
    flat = np.frombuffer(raw, dtype=np.uint8)
    data: pa.Buffer = raw
    # Arrow's pool keeps freed memory. malloc gives blocks of this size back to the system, and a new page for each
    # 4 KiB costs more than the rest of the decoding.
    if _has_planes(dtype, codec):
        data = _merged(flat[: size // 2], flat[size // 2 :])
    elif codec == "none":  # the caller may write to its tensor, not to a shared buffer
        data = pa.allocate_buffer(size)
        np.frombuffer(data, dtype=np.uint8)[...] = flat
    return torch.frombuffer(data, dtype=torch.uint8, count=size).view(dtype).reshape(shape)


def _merged(low: np.ndarray[Any, Any], high: np.ndarray[Any, Any]) -> pa.Buffer:
    """The little-endian words of these bytes, and one byte more.

    Widening stores a byte and a zero behind it: from the second byte on, that puts each high byte in its place and
    clears the low ones. In parts, so that the second pass finds them in the processor's cache.
    """
    count = len(low)
    data = pa.allocate_buffer(2 * count + 1)
    words, shifted = (np.ndarray(count, "<u2", data, offset) for offset in (0, 1))
    np.frombuffer(data, np.uint8)[0] = 0
    for start in range(0, count, _PART):
        part = slice(start, start + _PART)
        shifted[part] = high[part]
        words[part] |= low[part]
    return data


def _encode_image(image: Image.Image, codec: str) -> Encoded:
    if codec == "none" and image.mode in _PIXEL_CHANNELS and "transparency" not in image.info:
        shape = (image.height, image.width, _PIXEL_CHANNELS[image.mode])
        return Encoded(image.tobytes(), shape, PIXELS + image.mode)
    if image.mode not in _PNG_MODES:
        raise CodecError(f"an image of mode {image.mode} cannot be cached as PNG; convert it to RGB")
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=1)
    return Encoded(out.getvalue(), (), PNG)


def _encode_tree(value: Any, codec: str) -> Encoded:
    leaves: list[bytes] = []

    def spec(node: Any) -> Any:
        if type(node) in (list, tuple):
            return {type(node).__name__: [spec(item) for item in node]}
        if type(node) is dict and all(type(key) is str for key in node):
            return {"dict": [[key, spec(item)] for key, item in node.items()]}
        if isinstance(node, list | tuple | dict):
            raise CodecError(
                f"a {type(node).__qualname__} cannot be cached; use plain lists, tuples and dicts with text keys"
            )
        leaf = encode_value(node, codec)
        leaves.append(leaf.data)
        return {"leaf": [leaf.dtype, list(leaf.shape), len(leaf.data)]}

    header = json.dumps(spec(value), separators=(",", ":")).encode()
    return Encoded(b"".join([len(header).to_bytes(8, "little"), header, *leaves]), (), TREE)


def _decode_tree(view: memoryview, codec: str) -> Any:
    at = 8 + int.from_bytes(view[:8], "little")
    header = json.loads(bytes(view[8:at]))
    total = 0

    def build(node: dict[str, Any]) -> Any:
        nonlocal at, total
        ((kind, content),) = node.items()
        if kind == "leaf":
            dtype, shape, size = content
            if type(size) is not int or size < 0 or dtype == TREE:
                raise CodecError(f"a nested value has a {dtype!r} of {size!r} bytes, which is none that is stored")
            at += size
            if at > len(view):
                raise CodecError(f"a nested value ends at byte {at} of {len(view)}")
            leaf = view[at - size : at]
            total = bounds.check_limit(total + _value_bytes(leaf, shape, dtype, codec))
            return decode_value(leaf, shape, dtype, codec)
        if kind == "dict":
            return {key: build(item) for key, item in content}
        items = [build(item) for item in content]
        return tuple(items) if kind == "tuple" else items

    value = build(header)
    if at != len(view):
        raise CodecError(f"{len(view) - at} bytes are left behind a nested value")
    return value
