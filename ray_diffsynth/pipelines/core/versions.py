"""What the keys of the cache say of classes and their attributes: stated versions, and values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np

from ray_diffsynth.errors import UserError


class CacheKeyError(UserError, ValueError):
    """Something that a cached value depends on cannot stand in a key; the message names it and the fix."""


def stated_versions(cls: type, base: type, neutral: Collection[str] = ()) -> str:
    """The versions that `cls` and its bases below `base` state, `my_module.Sub:v1 Image:v2`, with that of `base`.

    A class that defines nothing but `__init__` and names in `neutral`, which change no encoded value, needs none.

    Raises:
        CacheKeyError: any other class without an integer `version` of its own.
    """
    found = []
    for each in cls.__mro__:
        if each is not base and issubclass(base, each) or each.__module__ in ("abc", "typing"):
            continue
        own = vars(each)
        if "version" in own:
            if type(own["version"]) is not int:
                raise CacheKeyError(f"{_label(each)}.version is {own['version']!r}; give a whole number, version = 1")
            found.append(f"{_label(each)}:v{own['version']}")
        elif each is not base and (names := sorted(n for n in own if not n.startswith("_abc") and _counts(n, neutral))):
            raise CacheKeyError(
                f"{_label(each)} defines {', '.join(names)} and states no version of its own, so that the cache could "
                "not tell when its results change; write `version = 1` in the class, and raise it with each change of "
                "what the class makes"
            )
    return " ".join(found)


def _counts(name: str, neutral: Collection[str]) -> bool:
    return not (name.startswith("__") and name.endswith("__")) and name not in neutral


def _label(cls: type) -> str:
    """Name of a class; those of this package may move between modules."""
    return cls.__qualname__ if cls.__module__.startswith("ray_diffsynth.") else f"{cls.__module__}.{cls.__qualname__}"


def attributes_hash(name: str, attributes: Mapping[str, Any]) -> str:
    """Hash of the attributes by value: texts, numbers, None, tensors, arrays, enums, paths, and what holds them.

    Raises CacheKeyError for a value of another kind; `name` is whose attributes they are.
    """
    text = json.dumps({key: _plain(f"{name}.{key}", value) for key, value in attributes.items()}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(name: str, value: Any) -> Any:
    import torch  # only here: the declaration of a unit needs none

    if isinstance(value, Enum):
        return ["enum", _label(type(value)), value.name]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (bytes, complex, torch.dtype, torch.device, PurePath)):
        return [type(value).__name__, str(value)]
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().contiguous()
        return ["tensor", str(dense.dtype), list(dense.shape), _bytes_hash(dense.flatten().view(torch.uint8).numpy())]
    if isinstance(value, (np.ndarray, np.generic)) and not np.asarray(value).dtype.hasobject:
        array = np.ascontiguousarray(value)
        return ["array", array.dtype.str, list(array.shape), _bytes_hash(array)]
    if isinstance(value, Mapping):
        items = [[_plain(f"a key of {name}", key), _plain(f"{name}[{key!r}]", item)] for key, item in value.items()]
        return ["mapping", sorted(items, key=json.dumps)]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [_plain(f"{name}[{index}]", item) for index, item in enumerate(value)]]
    if isinstance(value, (set, frozenset)):
        return ["set", sorted((_plain(f"an item of {name}", item) for item in value), key=json.dumps)]
    raise CacheKeyError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be compared by value, so that "
        "it cannot stand in the cache's keys; keep texts, numbers, tensors, arrays, or lists and dicts of them, and "
        "make the object of them in `process`"
    )


def _bytes_hash(array: np.ndarray[Any, Any]) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()
