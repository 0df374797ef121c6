"""A cache as safetensors files, one a sample, for programs that know nothing of it."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save

from ray_diffsynth import storage
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.reader import CacheReader

BATCH = 64


def export_cache(cache: str, output: str, limit: int | None = None) -> int:
    """Write `<output>/<row>.safetensors` for each sample (or the first `limit`) and `<output>/samples.jsonl`.

    Tensors keep their parameter's name; text, numbers and lists go to the file's metadata as JSON. A line of
    samples.jsonl has file, sample_id, bucket and caption. Returns how many were written. Raises CacheError, also for
    a parameter that safetensors has no form for.
    """
    reader = CacheReader(cache)
    captions = reader.manifest.read_captions(reader.cache)
    buckets = [name for name, rows in reader.buckets.items() for _ in rows]
    count = len(reader) if limit is None else min(limit, len(reader))
    lines = []
    for start in range(0, count, BATCH):
        rows = range(start, min(start + BATCH, count))
        for row, values in zip(rows, reader.read(rows), strict=True):
            sample_id, file = reader.sample_ids[row], f"{row:08d}.safetensors"
            facts = {"sample_id": sample_id, "bucket": buckets[row], "caption": captions[row]}
            tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, torch.Tensor)}
            plain = {name: _json(sample_id, name, value) for name, value in values.items() if name not in tensors}
            metadata = {name: value for name, value in facts.items() if value is not None} | plain
            storage.write_bytes_atomic(storage.join(output, file), save(tensors, metadata))
            lines.append(json.dumps({"file": file, **facts}, ensure_ascii=False))
    storage.write_bytes_atomic(storage.join(output, "samples.jsonl"), ("\n".join(lines) + "\n").encode())
    return count


def _json(sample_id: str, name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise CacheError(
            f"{name} of {sample_id} is a {type(value).__name__}, which safetensors cannot hold; read it from the cache "
            "with ray_diffsynth.cache.reader.CacheReader"
        ) from error
