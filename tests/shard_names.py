"""Names of shards for tests: of the form that a cache has, found again by a word."""

from __future__ import annotations

from ray_diffsynth.cache.store import shard_name


def stem(word: str) -> str:
    return shard_name([word])


def shard_file(word: str) -> str:
    return f"{stem(word)}.parquet"
