"""A hash of what a value holds, to see whether it was changed in place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image


def content_of(value: Any) -> bytes:
    """Equal for values of equal types and contents: tensors, arrays, images, numbers, text, and nestings of these.

    Of other objects their attributes count; models, functions and classes are told apart, not looked into.
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(value, digest.update, set())
    return digest.digest()


def _add(value: Any, update: Callable[[bytes], None], inside: set[int]) -> None:
    update(f"\0{type(value).__module__}.{type(value).__qualname__}\0".encode())
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        update(repr(value).encode("utf-8", "surrogatepass"))
    elif isinstance(value, torch.Tensor):
        update(f"{value.dtype}{tuple(value.shape)}{value.requires_grad}".encode())
        if value.device.type != "meta":
            flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (np.ndarray, np.generic)):
        update(f"{value.dtype.str}{value.shape}".encode())
        update(repr(value).encode() if value.dtype.hasobject else value.tobytes())
    elif isinstance(value, Image.Image):
        update(f"{value.mode}{value.size}".encode())
        update(value.tobytes())
    elif isinstance(value, (torch.nn.Module, type)) or callable(value):
        update(str(id(value)).encode())
    elif id(value) in inside:
        update(b"again")
    else:
        inside.add(id(value))
        if isinstance(value, dict):
            for key, item in value.items():
                _add(key, update, inside)
                _add(item, update, inside)
        elif isinstance(value, (list, tuple)):
            for item in value:
                _add(item, update, inside)
        elif isinstance(value, (set, frozenset)):
            update(b"".join(sorted(content_of(item) for item in value)))
        elif hasattr(value, "__dict__"):
            _add(dict(vars(value)), update, inside)
        else:
            update(str(id(value)).encode())
        inside.discard(id(value))
