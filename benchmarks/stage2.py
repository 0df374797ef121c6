"""Stage 2 for the benchmarks: a model whose step takes a while, runs of it, and the times of their steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIDE, TOKENS, WIDTH = 256, 60, 3584


def model(folder: Path, layers: int = 4) -> Path:
    """A Qwen-Image folder without encoders' weights: a transformer of 128 channels and `layers` blocks."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    from ray_diffsynth.demo.tiny import build_tiny_model

    build_tiny_model(folder)
    torch.manual_seed(0)
    QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    ).save_pretrained(folder / "transformer")
    return folder


def config(model_folder: Path, data: Path, output: Path, **options: Any) -> Any:
    """A LoRA of rank 8 in fp32 (which CPUs compute well); no checkpoint but the last."""
    from ray_diffsynth.config import TrainConfig

    values = {"dtype": "float32", "lora_rank": 8, "save_steps": 10**6, "log_with": "none", **options}
    return TrainConfig(
        model=str(model_folder),
        dataset_base_path=str(data),
        output_path=str(output),
        task=values.pop("task", "sft:train"),
        **values,
    )


def step_seconds(output: Path, skip: int = 2) -> list[float]:
    """Seconds of each logged step but the first ones."""
    from ray_diffsynth.training.metrics import read_metrics

    return [line["samples"] / line["samples_per_second"] for line in read_metrics(str(output))][skip:]


class Turns:
    """Lets threads work one at a time, in turn: what slows this machine for a while slows all of them."""

    def __init__(self, members: int) -> None:
        self._changed = threading.Condition()
        self._members = list(range(members))
        self._turn = 0

    def next(self, mine: int) -> None:
        """Give the turn to the next one, and wait until it comes back."""
        with self._changed:
            self._pass_on(mine)
            self._changed.wait_for(lambda: self._turn == mine)

    def leave(self, mine: int) -> None:
        """Take no further turns."""
        with self._changed:
            self._pass_on(mine)
            self._members.remove(mine)

    def _pass_on(self, mine: int) -> None:
        if self._turn == mine:
            self._turn = self._members[(self._members.index(mine) + 1) % len(self._members)]
            self._changed.notify_all()


class InTurn:
    """A worker of plain Python whose steps are done in turn with others'; `seconds` of each step but the first.

    A step begins when the turn comes, and ends when its metrics are reported. after: the worker that must have done its
    first step before this one starts, since transformers cannot load two models at a time in one process.
    """

    def __init__(self, turns: Turns, mine: int, after: InTurn | None = None) -> None:
        from ray_diffsynth.training.context import LocalContext

        plain = LocalContext("cpu", progress=False)
        self.world_rank, self.world_size, self.device = 0, 1, plain.device
        self.seconds: list[float] = []
        self._turns, self._mine = turns, mine
        self._began: float | None = None
        self._started, self._after = threading.Event(), after

    def train(self, config: Any) -> list[float]:
        """Train as configured; the seconds of the steps."""
        from ray_diffsynth.training.loop import train

        if self._after is not None:
            self._after._started.wait()
        try:
            train(config, self)
        finally:
            self._started.set()
            self._turns.leave(self._mine)
        return self.seconds

    def report(self, metrics: Mapping[str, Any]) -> None:
        self._started.set()
        if self._began is not None:
            self.seconds.append(time.perf_counter() - self._began)
        self._turns.next(self._mine)
        self._began = time.perf_counter()

    def stop_requested(self) -> bool:
        return False

    def draw_samples(self, step: int, weights: Mapping[str, Any]) -> None:
        raise RuntimeError("benchmarks make no pictures")


class Timed:
    """A worker of plain Python that notes when each step was done, counted from when it was made."""

    def __init__(self, stop_after: int | None = None) -> None:
        from ray_diffsynth.training.context import LocalContext

        self._plain = LocalContext("cpu", progress=False)
        self.world_rank, self.world_size, self.device = 0, 1, self._plain.device
        self.began = time.perf_counter()
        self.done: list[float] = []
        self._stop_after = stop_after

    def report(self, metrics: Mapping[str, Any]) -> None:
        self.done.append(time.perf_counter() - self.began)

    def stop_requested(self) -> bool:
        # Asked at the start of a step, which is still done.
        return self._stop_after is not None and len(self.done) + 1 >= self._stop_after

    def draw_samples(self, step: int, weights: Mapping[str, Any]) -> None:
        raise RuntimeError("benchmarks make no pictures")
