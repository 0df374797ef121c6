"""Unsplit training decodes a dataset once before its order is made, so that what is damaged is in no step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ray_diffsynth.data.media import TRANSIENT
from ray_diffsynth.data.samples import ERRORS_OF_ALL_SAMPLES
from ray_diffsynth.data.warnings import collecting

T = TypeVar("T")

CHECKED_IMAGES, CHECKED_VIDEOS = 2000, 100
"""Samples up to which a dataset of images, or of videos, is decoded first. Of a larger one a damaged sample is met at
its step, where another one of its size takes its place."""
MACHINE_ERRORS = (*TRANSIENT, *ERRORS_OF_ALL_SAMPLES, MemoryError)
"""Errors of the machine, not of the sample: they end the attempt, and the next one tries again."""


def undecodable(items: Sequence[T], load: Callable[[T], Any]) -> dict[int, str]:
    """Position -> why, of the items that cannot be loaded. Raises `MACHINE_ERRORS`.

    It depends on the files alone, so that every worker and every attempt finds the same.
    """

    def problem(item: T) -> str:
        try:
            with collecting():  # it is logged when the sample is trained on
                load(item)
        except MACHINE_ERRORS:
            raise
        # As stage 1: whatever decoding raises is the sample's own failure.
        except Exception as error:
            return str(error) or type(error).__name__
        return ""

    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1)), thread_name_prefix="decode-check") as pool:
        return {position: why for position, why in enumerate(pool.map(problem, items)) if why}
