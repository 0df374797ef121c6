"""Claim 8: the speed-up of split over unsplit training at E epochs, against S(E) = (1 + r) / (1 + r / E).

r is the time to encode a sample over the time to train on it, both measured bare. Start-up apart: the unsplit run's and
stage 2's times are from their first step to their last, stage 1's is its encoding and writing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, main
from benchmarks.stage1 import draw, fresh
from benchmarks.stage2 import Timed, config

PICTURES, SIDE, TIMES, EPOCHS = 24, 128, 5, (1, 2, 5, 10)


def measure() -> list[Row]:
    import torch

    from ray_diffsynth.cache.store import GroupRow, write_shard
    from ray_diffsynth.demo.tiny import build_tiny_model
    from ray_diffsynth.training.loop import train
    from ray_diffsynth.training.setup import Setup
    from tests.training.helpers import write_cache

    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="claim-08-"))
    folder, data = build_tiny_model(root / "model"), draw(root / "data", PICTURES, SIDE)
    size: dict[str, Any] = {"height": SIDE, "width": SIDE}

    setup = Setup.of(config(folder, data, root / "x", task="sft", **size))
    source = setup.open_data()
    write_cache(setup, source, root / "cache")  # type: ignore[arg-type]
    module, _ = setup.build(torch.device("cpu"))

    def stage1() -> float:
        scratch = fresh(root / "scratch")
        began = time.perf_counter()
        samples = [module.encode(sample) for sample in source.fetch(range(PICTURES))]
        for group in module.stages.groups:
            found = [GroupRow(f"{n}", {p: s[p] for p in group.parameters}) for n, s in enumerate(samples)]
            write_shard(str(scratch), group.name, "shard", "all", found, codec="planes-zstd")
        return time.perf_counter() - began

    def training(task: str, base: Path, epochs: int) -> float:
        """Seconds of all steps, from the mean of those after the first."""
        context = Timed()
        output = fresh(root / task.replace(":", "_"))
        train(config(folder, base, output, task=task, num_epochs=epochs, **size), context)
        return (context.done[-1] - context.done[0]) / (len(context.done) - 1) * len(context.done)

    rows: list[Row] = []
    for epochs in EPOCHS:
        pairs: list[tuple[float, float, float]] = []
        for _ in range(TIMES if epochs < 5 else 3):
            pairs.append((training("sft", data, epochs), stage1(), training("sft:train", root / "cache", epochs)))
        whole, encode, train_all = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratio = encode / (train_all / epochs)
        ideal = (1 + ratio) / (1 + ratio / epochs)
        measured = statistics.median(w / (e + t) for w, e, t in pairs)
        details = {
            "unsplit": whole,
            "stage1": encode,
            "stage2": train_all,
            "r": ratio,
            "S(E)": ideal,
            "speedup": measured,
        }
        rows.append(Row("8", f"split speed-up / S(E) at {epochs} epochs", measured / ideal, ">=", 0.97, details))
    return rows


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
