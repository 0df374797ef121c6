"""Claim 13: what a commit writes after one new image in a million, against the index written whole as format 3 had it.

Bytes are counted where files are written: parts of the index, quarantine and manifest. Without the images' own files.
"""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.harness import Row, main, seconds

ROWS, PER_FILE, TEXTS_PER_FILE = 1_000_000, 64, 512
BUCKETS = ("768x1344", "832x1216", "1024x1024", "1216x832", "1344x768")
WORDS = (
    "a photo of",
    "in the",
    "old",
    "red",
    "green",
    "wooden",
    "house",
    "river",
    "bridge",
    "at night",
    "with",
    "people",
)
NEW = 6
"""How many images come, one after another, each with a commit."""


def _hex(count: int, digits: int, seed: int) -> pa.Array:
    """Random hexadecimal texts."""
    data = np.random.default_rng(seed).bytes(count * digits // 2).hex()
    return pa.Array.from_buffers(
        pa.string(),
        count,
        [None, pa.py_buffer(np.arange(0, count * digits + 1, digits, dtype=np.int32)), pa.py_buffer(data.encode())],
    )


def _index(rows: int) -> tuple[pa.Table, pa.Array]:
    """An index of two groups, bucket by bucket, and its captions of some 170 characters."""
    from ray_diffsynth.cache.index import index_schema

    numbers = np.arange(rows)
    ids = pa.array([f"pictures/{number:08d}.jpg" for number in numbers.tolist()])
    columns: dict[str, Any] = {"sample_id": ids, "source": pa.array([f"/data/{one}" for one in ids.to_pylist()])}
    columns["bucket"] = pa.array(BUCKETS).take(pa.array(numbers * len(BUCKETS) // rows))
    for seed, (group, per_file) in enumerate((("vae", PER_FILE), ("text_encoder", TEXTS_PER_FILE))):
        names = [f"{stem}.parquet" for stem in _hex(rows // per_file + 1, 24, seed + 10).to_pylist()]
        columns[f"{group}_key"] = _hex(rows, 32, seed)
        columns[f"{group}_file"] = pa.array(names).take(pa.array(numbers // per_file))
        columns[f"{group}_row_group"] = pa.array(np.zeros(rows, np.int32))
        columns[f"{group}_row"] = pa.array((numbers % per_file).astype(np.int32))
    draw = random.Random(0)
    captions = pa.array([" ".join(draw.choices(WORDS, k=25)) for _ in range(rows)])
    return pa.table(columns, schema=index_schema(("vae", "text_encoder"))), captions


def _with_new(index: pa.Table, captions: pa.Array, at: int, number: int) -> tuple[pa.Table, pa.Array]:
    """One more row, `at` in the order of training, with files of its own."""
    row = index.slice(at, 1).to_pylist()[0]
    row |= {"sample_id": f"new/{number}.jpg", "source": f"/data/new/{number}.jpg", "vae_row": 0, "text_encoder_row": 0}
    for group in ("vae", "text_encoder"):
        row[f"{group}_key"] = f"{number:032x}"
        row[f"{group}_file"] = f"{number:024x}.parquet"
    new = pa.Table.from_pylist([row], schema=index.schema)
    table = pa.concat_tables([index.slice(0, at), new, index.slice(at)])
    return table, pa.concat_arrays([captions.slice(0, at), pa.array(["a new one"]), captions.slice(at)])


def measure() -> list[Row]:
    from ray_diffsynth import storage
    from ray_diffsynth.cache.commit import commit
    from ray_diffsynth.cache.index import QUARANTINE_SCHEMA, bucket_ranges
    from ray_diffsynth.cache.manifest import GroupSpec, Manifest

    written: defaultdict[str, int] = defaultdict(int)
    real = storage.write_bytes_atomic

    def counted(path: str, data: Any, **options: Any) -> None:
        folder = Path(path).parent.name
        written[folder if folder in ("index", "quarantine") else "manifest"] += memoryview(data).nbytes
        real(path, data, **options)

    storage.write_bytes_atomic = counted
    root = Path(tempfile.mkdtemp(prefix="claim-13-"))

    def bytes_of(folder: str, index: pa.Table, captions: pa.Array, version: int) -> tuple[int, float]:
        """Bytes that the commit writes, and its seconds."""
        draft = Manifest(
            family="qwen_image",
            task="sft:data_process",
            trainable=("dit",),
            parameters=("input_latents", "prompt_embeds"),
            groups=tuple(
                GroupSpec(name=name, parameters=(f"of_{name}",), fingerprint="f") for name in ("vae", "text_encoder")
            ),
            buckets={name: len(rows) for name, rows in bucket_ranges(index).items()},
            counts={"samples": index.num_rows, "quarantined": 0, "total": index.num_rows},
            codec="planes-zstd",
            dtype="bfloat16",
            version=version,
        )
        written.clear()
        empty = QUARANTINE_SCHEMA.empty_table()
        took = seconds(lambda: commit(str(root / folder), draft, index, empty, pa.chunked_array([captions])))
        return sum(written.values()), took

    index, captions = _index(ROWS)
    before, before_s = bytes_of("before", index, captions, 3)
    whole, whole_s = bytes_of("now", index, captions, 4)
    draw = random.Random(1)
    found = []
    for number in range(NEW):
        index, captions = _with_new(index, captions, draw.randrange(index.num_rows), number)
        found.append(bytes_of("now", index, captions, 4))
    one = [size for size, _ in found]
    parts = len(Manifest.load(str(root / "now")).index_parts)
    reread = seconds(lambda: Manifest.load(str(root / "now")).read_index(str(root / "now")))
    reread_before = seconds(lambda: Manifest.load(str(root / "before")).read_index(str(root / "before")))
    details = {
        "index_bytes": whole,
        "index_bytes_in_one_file": before,
        "parts": parts,
        "bytes_of_each_new_image": one,
        "commit_s": {"one file": before_s, "first in parts": whole_s, "one new": sorted(s for _, s in found)[NEW // 2]},
        "read_index_s": {"one file": reread_before, "parts": reread},
    }
    return [
        Row(
            "13",
            "bytes written after one new image in 10^6 / index",
            sorted(one)[NEW // 2] / whole,
            "<=",
            0.02,
            details,
        ),
        Row("13", f"the same, the most of {NEW} images", max(one) / whole, "<=", 0.02, {}),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
