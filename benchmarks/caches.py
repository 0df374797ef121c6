"""A committed cache of Gaussian latents and embeddings, written through the package's own functions."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import torch

from ray_diffsynth.cache.commit import commit
from ray_diffsynth.cache.index import QUARANTINE_SCHEMA, index_schema
from ray_diffsynth.cache.manifest import GroupSpec, Manifest
from ray_diffsynth.cache.store import GroupRow, shard_name, write_shard
from ray_diffsynth.data.buckets import Bucket, rows_per_shard


def gaussian_cache(
    cache: Path, samples: int, side: int = 1024, tokens: int = 60, codec: str = "planes-zstd", share: int = 4
) -> int:
    """`samples` bf16 latents (16 channels, side/8) and embeddings (tokens x 3584), one for `share` samples.

    Returns their raw bytes, each distinct value counted once.
    """
    bucket = Bucket(side, side)
    per_file = rows_per_shard(bucket)
    columns: dict[str, list[object]] = {name: [] for name in index_schema(("vae", "text_encoder")).names}
    generator = torch.Generator().manual_seed(0)
    raw = 0
    text_rows = []
    for number in range(-(-samples // share)):
        value = torch.randn(1, tokens, 3584, generator=generator).bfloat16()
        raw += value.nbytes
        text_rows.append(GroupRow(f"t{number}", {"prompt_embeds": value}))
    texts = [
        write_shard(
            str(cache), "text_encoder", shard_name([f"t{start}"]), "all", text_rows[start : start + 32], codec=codec
        )
        for start in range(0, len(text_rows), 32)
    ]
    nbytes = 0
    for start in range(0, samples, per_file):
        members = range(start, min(start + per_file, samples))
        latents = [torch.randn(1, 16, side // 8, side // 8, generator=generator).bfloat16() for _ in members]
        raw += sum(value.nbytes for value in latents)
        rows = [GroupRow(f"v{i}", {"input_latents": value}) for i, value in zip(members, latents, strict=True)]
        shard = write_shard(str(cache), "vae", shard_name([f"v{start}"]), bucket.name, rows, codec=codec)
        nbytes += shard.nbytes
        for position, i in enumerate(members):
            text = texts[i // share // 32]
            place = (
                f"v{i}",
                shard.file,
                *shard.locate(position),
                f"t{i // share}",
                text.file,
                *text.locate(i // share % 32),
            )
            for name, value in zip(columns, (f"s{i}", f"{i}.png", bucket.name, *place), strict=True):
                columns[name].append(value)
    manifest = Manifest(
        family="qwen_image",
        task="sft:data_process",
        trainable=("dit",),
        parameters=("input_latents", "prompt_embeds"),
        groups=(
            GroupSpec(name="vae", parameters=("input_latents",), fingerprint="f0", rows=samples, nbytes=nbytes),
            GroupSpec(name="text_encoder", parameters=("prompt_embeds",), fingerprint="f1", rows=len(text_rows)),
        ),
        buckets={bucket.name: samples},
        counts={"samples": samples, "quarantined": 0, "total": samples, "texts": len(text_rows)},
        codec=codec,
        dtype="bfloat16",
    )
    index = pa.Table.from_pydict(columns, schema=index_schema(("vae", "text_encoder")))
    commit(str(cache), manifest, index, pa.Table.from_pylist([], schema=QUARANTINE_SCHEMA))
    return raw
