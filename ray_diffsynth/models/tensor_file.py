"""safetensors files in pieces, which a thread can write beside the one that trains.

The library's own `save` holds Python's lock until the whole file stands in memory, twice: for 1 GB a second or more in
which no other thread runs. Here each piece is a tensor's own memory, and writing it lets the others run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

# In the order in which the library writes them: large items first, so that all are aligned.
_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: number for number, dtype in enumerate(_NAMES)}


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """The content of a safetensors file, in its order; equal tensors and metadata give equal bytes.

    The pieces share the memory of the tensors, which must be contiguous and on the CPU: do not change them before the
    pieces are written. Raises ValueError for a dtype that the format does not have.
    """
    for name, value in tensors.items():
        if value.dtype not in _NAMES:
            raise ValueError(f"{name} is {value.dtype}, which a safetensors file cannot hold")
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    pieces: list[bytes | memoryview] = []
    offset = 0
    for name in sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name)):
        value = tensors[name].detach()
        piece = value.reshape(-1).view(torch.uint8).numpy().data
        header[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + len(piece)],
        }
        pieces.append(piece)
        offset += len(piece)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return [len(text).to_bytes(8, "little") + text, *pieces]
