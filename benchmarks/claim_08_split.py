"""Claim 8: the speed-up of split over unsplit training at E epochs, against S(E) = (1 + r) / (1 + r / E).

r is the time to encode a sample over the time to train on it. Start-up apart: the unsplit run's and stage 2's times are
those of their steps, stage 1's is its encoding and writing. The three take turns of a few steps or samples each.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, main
from benchmarks.stage1 import draw, fresh
from benchmarks.stage2 import config, train_in_turn
from benchmarks.turns import Turn, Turns

IMAGES, SIDE, TURN = 32, 128, 4
TIMES = {1: 5, 2: 5, 5: 3, 10: 3}
"""Epochs: how often it is measured; the fewer steps, the oftener."""


def measure() -> list[Row]:
    import torch

    from ray_diffsynth.cache.store import GroupRow, shard_name, write_shard
    from ray_diffsynth.demo.tiny import build_tiny_model
    from ray_diffsynth.plan.run_plan import RunPlan
    from ray_diffsynth.training.build import build_module
    from ray_diffsynth.training.data.opening import open_data
    from tests.training.helpers import write_cache

    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="claim-08-"))
    folder, data = build_tiny_model(root / "model"), draw(root / "data", IMAGES, SIDE)
    size: dict[str, Any] = {"height": SIDE, "width": SIDE}

    plan = RunPlan.resolve(config(folder, data, root / "x", task="sft", **size))
    source = open_data(plan)
    write_cache(plan, source, root / "cache")  # type: ignore[arg-type]
    module, _ = build_module(plan, torch.device("cpu"))

    def measured(epochs: int) -> tuple[float, float, float]:
        """Seconds of all unsplit steps, of encoding and writing, and of all steps of stage 2."""
        turns = Turns({"unsplit": 1, "stage1": 1, "split": 1})

        def training(member: str, task: str, base: Path, after: str | None = None) -> None:
            output = fresh(root / f"out-{member}")
            settings = config(folder, base, output, task=task, num_epochs=epochs, **size)
            train_in_turn(settings, turns, member, after, TURN)

        def stage1() -> float:
            """Some samples in every `epochs`-th turn, so that they are spread over the steps; then the files."""
            place, spent, encoded = Turn(turns.port, "stage1"), 0.0, []
            for turn in range(IMAGES * epochs // TURN):
                place.next()
                if turn % epochs == 0:
                    began = time.perf_counter()
                    for row in range(TURN):  # one at a time, as the unsplit run does
                        encoded += [module.encode(sample) for sample in source.fetch([turn // epochs * TURN + row])]
                    spent += time.perf_counter() - began
            scratch, began = fresh(root / "scratch"), time.perf_counter()
            for group in module.stages.groups:
                found = [GroupRow(f"{n}", {p: s[p] for p in group.parameters}) for n, s in enumerate(encoded)]
                write_shard(str(scratch), group.name, shard_name(["shard"]), "all", found, codec="planes-zstd")
            spent += time.perf_counter() - began
            place.leave()
            return spent

        def steps(member: str) -> float:
            """Seconds of all its steps: the first turn, which warms up, counts like the others."""
            return statistics.mean(turns.seconds[member][1:]) * IMAGES * epochs / TURN

        with ThreadPoolExecutor(3) as pool:
            whole = pool.submit(training, "unsplit", "sft", data)
            encode = pool.submit(stage1)
            cached = pool.submit(training, "split", "sft:train", root / "cache", after="unsplit")
            whole.result(), cached.result()
        turns.join()
        return steps("unsplit"), encode.result(), steps("split")

    rows: list[Row] = []
    for epochs, times in TIMES.items():
        found = []
        for _ in range(times):
            whole, encode, train_all = measured(epochs)
            ratio = encode / (train_all / epochs)
            ideal = (1 + ratio) / (1 + ratio / epochs)
            speedup = whole / (encode + train_all)
            seconds = {"unsplit": whole, "stage1": encode, "stage2": train_all}
            found.append({**seconds, "r": ratio, "S(E)": ideal, "speedup": speedup, "share": speedup / ideal})
        share = statistics.median(one["share"] for one in found)
        what = f"split speed-up / S(E) at {epochs} epochs"
        rows.append(Row("8", what, share, ">=", 0.97, {"runs": found}))
    return rows


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
