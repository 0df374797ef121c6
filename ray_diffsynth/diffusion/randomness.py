"""Keyed randomness: every draw is a function of its purpose and its key, never of a global generator.

So neither a resume nor the number of workers changes what is trained: the noise of a sample in an epoch is the same
wherever and whenever it is drawn. torch is imported only by the functions that return torch objects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Which draw of which sample: the run's seed, the epoch, the repetition within the epoch, and the sample."""

    seed: int
    epoch: int
    repeat: int
    sample_id: str


def generator(purpose: str, *parts: object, device: str = "cpu") -> torch.Generator:
    """A fresh torch generator on `device`, seeded by a hash of (purpose, *parts)."""
    import torch

    # manual_seed takes a signed 64-bit integer.
    return torch.Generator(device).manual_seed(int.from_bytes(_digest(purpose, parts)[:8], "little") >> 1)


def uniform(purpose: str, *parts: object) -> float:
    """A number in [0, 1) with 53 random bits, a function of (purpose, *parts)."""
    return (int.from_bytes(_digest(purpose, parts)[:8], "little") >> 11) * 2.0**-53


def permutation(n: int, purpose: str, *parts: object) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A permutation of range(n), int64, a function of (purpose, *parts).

    Sorts raw Philox output, which numpy keeps stable between versions (unlike `Generator.permutation`, NEP 19).
    """
    key = int.from_bytes(_digest(purpose, parts), "little")
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable").astype(np.int64)


def sample_noise(shape: Sequence[int], key: SampleKey) -> torch.Tensor:
    """Standard normal noise of one sample: fp32 on the CPU; `shape` has a leading axis of 1."""
    import torch

    return torch.randn(tuple(shape), generator=generator("noise", key), dtype=torch.float32)


def sample_timestep_index(
    num: int, key: SampleKey, lo: float = 0.0, hi: float = 1.0, position: float | None = None
) -> int:
    """An index into `num` training timesteps, uniform over DiffSynth-Studio's range [int(lo * num), int(hi * num)).

    `position`, in [0, 1), says where in the range instead (see `diffusion.timestep_sampling`).

    Raises:
        ValueError: the range is empty or leaves [0, 1].
    """
    first, last = int(lo * num), int(hi * num)
    if not 0.0 <= lo <= hi <= 1.0 or first >= last:
        raise ValueError(
            f"no timestep lies between min_timestep_boundary={lo} and max_timestep_boundary={hi} of {num} timesteps; "
            f"use 0 <= min < max <= 1, at least 1/{num} apart"
        )
    return first + int((uniform("timestep", key) if position is None else position) * (last - first))


def _digest(purpose: str, parts: tuple[object, ...]) -> bytes:
    # JSON is unambiguous (1 is not "1", ("a", "b") is not ("ab",)) and equal on every platform.
    text = json.dumps([purpose, *parts], default=_plain, sort_keys=True)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).digest()


def _plain(part: object) -> object:
    if is_dataclass(part) and not isinstance(part, type):
        return asdict(part)
    if isinstance(part, np.generic):
        return part.item()
    raise TypeError(f"a random key cannot hold a {type(part).__name__}; use str, int, float, bool, None or a dataclass")
