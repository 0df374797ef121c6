"""Stage 2 for the benchmarks: a model whose step takes a while, runs of it, and the times of their steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.turns import Turns, in_turn

SIDE, TOKENS, WIDTH = 256, 60, 3584
OPTIONS: dict[str, Any] = {"dtype": "float32", "lora_rank": 8, "save_steps": 10**6, "log_with": "none"}
"""A LoRA of rank 8 in fp32 (which CPUs compute well); no checkpoint but the last."""


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
    """A run with `OPTIONS`, and these instead of or beside them."""
    from ray_diffsynth.config import TrainConfig

    values = {**OPTIONS, **options}
    return TrainConfig(
        model=str(model_folder),
        dataset_base_path=str(data),
        output_path=str(output),
        task=values.pop("task", "sft:train"),
        **values,
    )


def train_in_turn(config: Any, turns: Turns, member: str, after: str | None = None, steps: int = 1) -> None:
    """Train here, in plain Python, so many steps a turn.

    after: the member that must be ready before this one starts: transformers loads one model at a time in a process.
    """
    from ray_diffsynth.plan.run_plan import RunPlan
    from ray_diffsynth.training.runtime import LocalRuntime
    from ray_diffsynth.training.trainer import train

    class Worker(in_turn(LocalRuntime, turns.port, member, steps)):  # type: ignore[misc]
        def report(self, metrics: Mapping[str, Any]) -> None:
            if metrics["step"] == metrics["steps"]:
                self.turn.next()

    if after is not None:
        turns.wait_for(after)
    worker = Worker("cpu", progress=False)
    train(RunPlan.resolve(config), worker)
    worker.turn.leave()


class Timed:
    """A worker of plain Python that notes when each step was done, counted from when it was made."""

    def __init__(self, stop_after: int | None = None) -> None:
        from ray_diffsynth.training.runtime import LocalRuntime

        self._plain = LocalRuntime("cpu", progress=False)
        self.world_rank, self.world_size, self.device = 0, 1, self._plain.device
        self.began = time.perf_counter()
        self.done: list[float] = []
        self._stop_after = stop_after

    def report(self, metrics: Mapping[str, Any]) -> None:
        self.done.append(time.perf_counter() - self.began)

    def stop_requested(self) -> bool:
        # Asked at the start of a step, which is still done.
        return self._stop_after is not None and len(self.done) + 1 >= self._stop_after

    def own_samples(self, plan: Any) -> list[Any]:
        return []

    def draw_samples(self, step: int, weights: Mapping[str, Any]) -> None:
        raise RuntimeError("benchmarks make no images")
