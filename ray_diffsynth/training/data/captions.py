"""Caption dropout: some samples are trained with the empty caption, decided by their key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_diffsynth.diffusion.randomness import SampleKey, uniform


def is_dropped(key: SampleKey, part: float) -> bool:
    """Whether the sample loses its caption this time: a function of its key, like its noise."""
    return uniform("caption_dropout", key) < part


def drop_captions(
    samples: Sequence[dict[str, Any]], keys: Sequence[SampleKey], part: float, empty: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """`samples`, about `part` of them with the parameters of the empty caption (`empty`) in place of their own."""
    return [{**sample, **empty} if is_dropped(key, part) else sample for sample, key in zip(samples, keys, strict=True)]
