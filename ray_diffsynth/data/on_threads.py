"""Many small reads at once: on an object store each is a request, which mostly waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

READ_THREADS = 16
"""Captions, or archives, that are read at the same time."""
T = TypeVar("T")
R = TypeVar("R")


def on_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results in order; warnings come to the caller's collection."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        futures = [pool.submit(copy_context().run, function, item) for item in items]
        return [future.result() for future in futures]
