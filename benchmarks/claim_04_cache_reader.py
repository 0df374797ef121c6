"""Claim 4: the cache's reader against plain pyarrow over the same files; in the shuffled order of training against the
plain one.

The files hold zstd frames, so plain pyarrow reads them and undoes the same frames: what any reader must do. The reader
adds checksums, the byte planes, and tensors. Details give the figure against reading without decompressing as well.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.caches import gaussian_cache
from benchmarks.harness import Row, in_turn, main, seconds

SAMPLES, BATCH, TIMES = 160, 4, 5


def measure() -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from ray_diffsynth.cache.reader import CacheReader
    from ray_diffsynth.data.buckets import Bucket, rows_per_shard
    from ray_diffsynth.training.data.epoch_order import epoch_order

    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    root = Path(tempfile.mkdtemp(prefix="claim-04-"))
    raw = gaussian_cache(root, SAMPLES, share=1)
    files = sorted(root.glob("vae/*.parquet")) + sorted(root.glob("text_encoder/*.parquet"))
    codec = pa.Codec("zstd")

    def plain(decompress: bool) -> float:
        def run() -> None:
            for path in files:
                with pq.ParquetFile(path) as parquet:
                    for number in range(parquet.num_row_groups):
                        table = parquet.read_row_group(number, use_threads=False)
                        if decompress:
                            undo(table)

        def undo(table: pa.Table) -> None:
            name = table.column_names[2]
            for cell, shape in zip(table[name], table[name + "_shape"], strict=True):
                size = 1
                for side in shape.as_py():
                    size *= side
                codec.decompress(cell.as_buffer(), 2 * size)

        return raw / 1e9 / seconds(run)

    def through_reader(rows: list[list[int]]) -> float:
        reader = CacheReader(str(root))

        def run() -> None:
            for batch in rows:
                reader.read(batch)

        return raw / 1e9 / seconds(run)

    in_order = [list(range(start, start + BATCH)) for start in range(0, SAMPLES, BATCH)]
    name = "1024x1024"
    epoch = epoch_order(
        {name: range(SAMPLES)},
        rows_per_shard={name: rows_per_shard(Bucket.parse(name))},
        seed=0,
        epoch=0,
        batch_size=BATCH,
        virtual_ranks=1,
    )
    shuffled = [[int(row) for row in batch] for batch in epoch.rows.reshape(-1, BATCH)]
    for work in (lambda: plain(True), lambda: through_reader(in_order)):  # files into the page cache
        work()
    found = in_turn(lambda: plain(True), lambda: through_reader(in_order), TIMES)
    bare = in_turn(lambda: plain(False), lambda: through_reader(in_order), 3)
    order = in_turn(lambda: through_reader(in_order), lambda: through_reader(shuffled), TIMES)
    details = {**found, "unit": "GB/s of decoded tensors", "without_decompressing": bare}
    return [
        Row("4", "cache reader GB/s / plain pyarrow + zstd, same files", found["ratio"], ">=", 0.8, details),
        Row("4", "cache reader, shuffled / in order", order["ratio"], ">=", 0.95, order),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
