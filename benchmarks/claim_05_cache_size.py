"""Claim 5: the cache's bytes against its values as raw unpadded bf16, and that equal captions are stored once.

The latents are those of the demo's images through its trained VAE. Details give Gaussian noise as well, of which no
codec makes less than about 0.69.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness import Row, main
from benchmarks.stage1 import local_ray, preprocess

IMAGES, SIDE = 96, 128


def measure() -> list[Row]:
    import torch

    from ray_diffsynth.cache.codec import encode_value
    from ray_diffsynth.cache.inspection import inspect_cache
    from ray_diffsynth.cache.reader import CacheReader
    from ray_diffsynth.demo import demo_model_path
    from ray_diffsynth.demo.draw import draw_dataset

    root = Path(tempfile.mkdtemp(prefix="claim-05-"))
    draw_dataset(root / "data", IMAGES, height=SIDE, width=SIDE)
    table = root / "data" / "metadata.csv"
    lines = table.read_text("utf-8").splitlines()
    # Every caption three times.
    texts = [line.split(",", 1)[1] for line in lines[1:]]
    again = [f"{line.split(',', 1)[0]},{texts[number // 3]}" for number, line in enumerate(lines[1:])]
    table.write_text("\n".join([lines[0], *again]) + "\n", "utf-8")
    with local_ray():
        preprocess(demo_model_path(), root / "data", root / "cache", batch_size=8)
    facts = inspect_cache(str(root / "cache"))
    reader = CacheReader(str(root / "cache"))
    samples = reader.read(range(len(reader)))
    latents = sum(sample["input_latents"].nbytes for sample in samples)
    ratio = facts["groups"]["vae"]["bytes"] / latents
    distinct = len({text for text in (line.split(",", 1)[1] for line in again)})
    naive = latents + sum(sample["prompt_embeds"].nbytes for sample in samples)
    noise = torch.randn(16, 128, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    details = {
        "gaussian": len(encode_value(noise).data) / noise.nbytes,
        "bytes_per_sample": facts["bytes"] / len(reader),
        "all_bytes_over_raw": facts["bytes"] / naive,
    }
    return [
        Row("5", "bytes of latents in the cache / raw bf16", ratio, "<=", 0.75, details),
        Row("5", "text rows / distinct captions (each stored once)", facts["texts"] / distinct, "<=", 1.0, {}),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
