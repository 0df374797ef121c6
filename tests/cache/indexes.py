"""Committed indexes without the files that they name: as a commit sees a cache. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from ray_diffsynth.cache.commit import commit
from ray_diffsynth.cache.index import QUARANTINE_SCHEMA, index_schema
from ray_diffsynth.cache.manifest import GroupSpec, Manifest

GROUPS = ("vae", "text_encoder")


def _hex(text: str, digits: int) -> str:
    return hashlib.blake2b(text.encode(), digest_size=digits // 2).hexdigest()


def index_of(ids: Sequence[int]) -> pa.Table:
    """A row for each number, the even ones in the first bucket; 64 to a file of each group."""
    rows = [number for rest in (0, 1) for number in ids if number % 2 == rest]
    columns: dict[str, list[Any]] = {
        "sample_id": [f"pictures/{number:08d}.png" for number in rows],
        "source": [f"/data/pictures/{number:08d}.png" for number in rows],
        "bucket": ["32x64" if number % 2 == 0 else "64x64" for number in rows],
    }
    for group in GROUPS:
        columns[f"{group}_key"] = [_hex(f"{group} {number}", 32) for number in rows]
        files = {number // 128: f"{_hex(f'{group} {number // 128}', 24)}.parquet" for number in rows}
        columns[f"{group}_file"] = [files[number // 128] for number in rows]
        columns[f"{group}_row_group"] = [0] * len(rows)
        columns[f"{group}_row"] = [number // 2 % 64 for number in rows]
    return pa.table(columns, schema=index_schema(GROUPS))


def commit_ids(
    cache: str, ids: Sequence[int], bad: Sequence[int] = (), *, version: int = 4, **options: Any
) -> Manifest:
    """Commit `ids`, with `bad` in quarantine; `options` are those of `commit`."""
    index = index_of(ids)
    even = sum(number % 2 == 0 for number in ids)
    buckets = {"32x64": even, "64x64": len(ids) - even}
    manifest = Manifest(
        family="qwen_image",
        task="sft:data_process",
        trainable=("dit",),
        parameters=("input_latents", "prompt_embeds"),
        groups=tuple(GroupSpec(name=name, parameters=(f"of_{name}",), fingerprint="f") for name in GROUPS),
        buckets={name: count for name, count in buckets.items() if count},
        counts={"samples": len(ids), "quarantined": len(bad), "total": len(ids) + len(bad)},
        codec="none",
        dtype="bfloat16",
        version=version,
    )
    entries = [{"sample_id": f"{number}.png", "source": "", "error": "MediaError", "message": "why"} for number in bad]
    return commit(cache, manifest, index, pa.Table.from_pylist(entries, schema=QUARANTINE_SCHEMA), **options)
