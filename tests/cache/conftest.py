"""A small cache with two groups, written through the public functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from ray_diffsynth.cache.commit import commit
from ray_diffsynth.cache.index import QUARANTINE_SCHEMA, index_schema
from ray_diffsynth.cache.manifest import GroupSpec, Manifest
from ray_diffsynth.cache.store import GroupRow, write_shard
from tests.shard_names import shard_file, stem

BUCKETS = {"32x64": 5, "64x64": 7}


def latents(sample: int) -> torch.Tensor:
    return torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(sample)).bfloat16()


def embeds(text: int) -> torch.Tensor:
    return torch.full((1, 3 + text, 8), float(text), dtype=torch.bfloat16)


def expected(sample: int) -> dict[str, Any]:
    return {"input_latents": latents(sample), "prompt_embeds": embeds(sample % 3)}


def write_cache(cache: str, *, codec: str = "planes-zstd", rows_per_file: int = 3, empty: bool = True) -> Manifest:
    """12 samples in two buckets; 3 distinct texts, the first of which is the empty caption."""
    index: dict[str, list[Any]] = {name: [] for name in index_schema(("vae", "text_encoder")).names}
    texts = [GroupRow(f"t{i}", {"prompt_embeds": embeds(i)}) for i in range(3)]
    nbytes = write_shard(cache, "text_encoder", stem("texts"), "all", texts, codec=codec, rows_per_group=2).nbytes
    sample = latent_bytes = 0
    for bucket, size in BUCKETS.items():
        members = list(range(sample, sample + size))
        for start in range(0, size, rows_per_file):
            part = members[start : start + rows_per_file]
            rows = [GroupRow(f"v{i}", {"input_latents": latents(i)}) for i in part]
            shard = write_shard(cache, "vae", stem(f"{bucket}-{start}"), bucket, rows, codec=codec)
            latent_bytes += shard.nbytes
            for position, i in enumerate(part):
                row = (f"s{i}", f"{i}.png", bucket, f"v{i}", shard.file, *shard.locate(position))
                text = (f"t{i % 3}", shard_file("texts"), *divmod(i % 3, 2))
                for name, value in zip(index, (*row, *text), strict=True):
                    index[name].append(value)
        sample += size
    quarantine = [{"sample_id": "bad.png", "source": "/bad.png", "error": "MediaError", "message": "why"}]
    manifest = Manifest(
        family="qwen_image",
        task="sft:data_process",
        trainable=("dit",),
        parameters=("input_latents", "prompt_embeds"),
        groups=(
            GroupSpec(name="vae", parameters=("input_latents",), fingerprint="f0", rows=12, nbytes=latent_bytes),
            GroupSpec(
                name="text_encoder",
                parameters=("prompt_embeds",),
                fingerprint="f1",
                parts={"weights:text_encoder": "abc"},
                rows=3,
                nbytes=nbytes,
                empty_key="t0" if empty else None,
                empty_at=(shard_file("texts"), 0, 0) if empty else None,
            ),
        ),
        buckets=BUCKETS,
        counts={"samples": 12, "quarantined": 1, "total": 13, "texts": 3},
        codec=codec,
        dtype="bfloat16",
    )
    table = pa.Table.from_pydict(index, schema=index_schema(("vae", "text_encoder")))
    return commit(cache, manifest, table, pa.Table.from_pylist(quarantine, schema=QUARANTINE_SCHEMA))


@pytest.fixture
def make_cache() -> Callable[..., Manifest]:
    return write_cache


@pytest.fixture
def sample() -> Callable[[int], dict[str, Any]]:
    return expected


@pytest.fixture
def cache(tmp_path: Path) -> str:
    write_cache(str(tmp_path / "cache"))
    return str(tmp_path / "cache")
