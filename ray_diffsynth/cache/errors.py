"""The error of a cache, apart from the modules that need torch."""

from __future__ import annotations

from ray_diffsynth.errors import UserError


class CacheError(UserError):
    """A cache that is absent, damaged, or not the one that is asked for; the message says what to do."""


def repair_advice(cache: str) -> str:
    """The end of an error about damage."""
    command = f"python -m ray_diffsynth.cache repair {cache}"
    return f"run `{command}`, then jobs/preprocess.py again: it encodes only what is lost"
