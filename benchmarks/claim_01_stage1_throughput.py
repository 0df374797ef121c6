"""Claims 1 and 1b: stage 1 with one actor against the bare encoding, and against decode, encode and write in turn."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness import Row, in_turn, main, seconds
from benchmarks.stage1 import draw, fresh, local_ray, preprocess, steady_rate

IMAGES, SOURCE, SIDE, BATCH, TIMES = 256, 1024, 256, 4, 5


def measure() -> list[Row]:
    import torch

    from ray_diffsynth.cache.store import GroupRow, shard_name, write_shard
    from ray_diffsynth.config import PreprocessConfig
    from ray_diffsynth.data.buckets import Bucket
    from ray_diffsynth.data.samples import load_inputs
    from ray_diffsynth.demo.tiny import build_tiny_model
    from ray_diffsynth.plan.run_plan import RunPlan
    from ray_diffsynth.preprocess.encode_batches import encode_samples
    from ray_diffsynth.preprocess.encoder import Encoder
    from ray_diffsynth.preprocess.messages import EncoderSpec

    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="claim-01-"))
    model, data = build_tiny_model(root / "model"), draw(root / "data", IMAGES, SOURCE, captions=4, suffix="jpg")
    options = {"height": SIDE, "width": SIDE, "batch_size": BATCH, "num_workers": 1, "dtype": "float32"}
    plan = RunPlan.resolve(
        PreprocessConfig(model=str(model), dataset_base_path=str(data), output_path=str(root / "x"), **options)
    )
    group = plan.group("vae")
    encoder = Encoder(EncoderSpec(plan, group, BATCH))
    bucket = Bucket(SIDE, SIDE)
    rows = [{"image": f"{number:05d}.jpg"} for number in range(64)]
    decoded = [load_inputs(row, bucket, plan.sample, only=group.inputs) for row in rows]

    def bare() -> float:
        spent = seconds(lambda: encode_samples(encoder.pipe, encoder.group, group.settings, decoded, BATCH))
        return len(rows) / spent

    def serial() -> float:
        def run() -> None:
            inputs = [load_inputs(row, bucket, plan.sample, only=group.inputs) for row in rows]
            results, _ = encode_samples(encoder.pipe, encoder.group, group.settings, inputs, BATCH)
            found = [GroupRow(str(at), result) for at, result in enumerate(results) if isinstance(result, dict)]
            write_shard(str(root / "serial"), "vae", shard_name(["shard"]), bucket.name, found, codec="planes-zstd")

        return len(rows) / seconds(run)

    def stage1() -> float:
        cache = fresh(root / "cache")
        preprocess(model, data, cache, **options)
        return steady_rate(cache, "vae")

    with local_ray():
        against_serial: list[float] = []

        def both() -> float:
            against_serial.append(serial())
            return bare()

        found = in_turn(both, stage1, TIMES)
    serial_rate = sorted(against_serial)[len(against_serial) // 2]
    details = {**found, "serial": serial_rate, "pictures": IMAGES, "source": SOURCE, "side": SIDE}
    return [
        Row("1", "stage-1 steady throughput / bare encode loop, 1 actor", found["ratio"], ">=", 0.92, details),
        Row("1b", "the same / serial decode + encode + write", found["second"] / serial_rate, ">=", 1.15, {}),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
