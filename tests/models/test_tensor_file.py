"""safetensors files in pieces: the library's own bytes, without a copy."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from ray_diffsynth.models.tensor_file import tensor_file

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]


def test_the_bytes_are_those_of_the_library() -> None:
    torch.manual_seed(0)
    tensors = {f"b.{dtype}": (torch.randn(3, 5) * 9).abs().to(dtype) for dtype in DTYPES}
    tensors |= {"a.step": torch.tensor(7.0), "c.empty": torch.zeros(0, 4), 'a\\"b': torch.ones(1), "Z": torch.ones(2)}
    assert b"".join(tensor_file(tensors)) == safetensors.torch.save(tensors)
    metadata = {"format": "pt"}
    assert b"".join(tensor_file(tensors, metadata)) == safetensors.torch.save(tensors, metadata)
    assert b"".join(tensor_file({})) == safetensors.torch.save({})


def test_metadata_has_one_order_and_other_names_are_read() -> None:
    tensors = {"größe": torch.arange(3.0)}
    data = b"".join(tensor_file(tensors, {"z": "1", "format": "pt", "a": "ü"}))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == ["a", "format", "z"] and header["__metadata__"]["a"] == "ü"
    assert torch.equal(safetensors.torch.load(data)["größe"], tensors["größe"])


def test_a_piece_is_the_memory_of_its_tensor() -> None:
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    _, piece = tensor_file({"a": tensor})
    tensor.fill_(1.0)
    assert bytes(piece) == b"\x80\x3f" * 4


def test_a_dtype_that_the_format_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"x is torch\.complex128"):
        tensor_file({"x": torch.zeros(1, dtype=torch.complex128)})
