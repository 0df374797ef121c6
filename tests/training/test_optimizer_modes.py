"""Schedule-free optimizers: steps in training mode; files, validation and images with the averaged weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from ray_diffsynth.plan.run_plan import RunPlan, TrainPlan
from ray_diffsynth.training.optim import OptimizerError
from ray_diffsynth.training.optimizer_modes import evaluated, has_modes, to_training
from ray_diffsynth.training.report.metrics_log import read_metrics
from ray_diffsynth.training.report.sample_prompts import SamplePrompt
from ray_diffsynth.training.result import TrainResult
from ray_diffsynth.training.runtime import LocalRuntime
from ray_diffsynth.training.trainer import train
from tests.training.conftest import CacheMaker
from tests.training.helpers import Runs, make_config
from tests.training.own_optimizers import ScheduleFreeSGD

OPTIONS: dict[str, Any] = {
    "customized_optimizer": "tests.training.own_optimizers:ScheduleFreeSGD",
    "max_steps": 6,
    "save_steps": 2,
    "keep_checkpoints": 9,
    "validation_samples": 1,
    "validation_steps": 1,
    "learning_rate": 1.0,
    "log_with": "none",
}


def run(model: Path, base: Path, output: Path, runtime: LocalRuntime | None = None, **changes: Any) -> TrainResult:
    config = make_config(model, base, output, **{**OPTIONS, **changes})
    return train(RunPlan.resolve(config), runtime or LocalRuntime("cpu", progress=False))


def test_switching_there_and_back_changes_no_bit() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64))
    optimizer = ScheduleFreeSGD([weight], lr=0.3)
    to_training(optimizer)
    for _ in range(3):
        (weight**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before, z = weight.detach().clone(), optimizer.state[weight]["z"].clone()
    with evaluated(optimizer):
        assert not torch.equal(weight, before)
        expected = before.lerp(z, 1 - 1 / 0.9)
        assert torch.equal(weight, expected)
    assert torch.equal(weight, before) and torch.equal(optimizer.state[weight]["z"], z)
    assert optimizer.param_groups[0]["train_mode"] is True
    with pytest.raises(ZeroDivisionError), evaluated(optimizer):
        raise ZeroDivisionError
    assert torch.equal(weight, before) and optimizer.param_groups[0]["train_mode"] is True
    plain = torch.optim.SGD([weight], lr=0.1)
    with evaluated(plain):
        assert torch.equal(weight, before) and not has_modes(plain)


class Drawn(LocalRuntime):
    """As where an actor draws: keeps the weights that it is asked to draw with."""

    def __init__(self) -> None:
        super().__init__("cpu", progress=False)
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def own_samples(self, plan: TrainPlan) -> Sequence[SamplePrompt]:
        return ()

    def draw_samples(self, step: int, weights: Any) -> None:
        self.weights[step] = dict(weights)


def test_what_is_written_is_the_average_and_the_checkpoint_goes_on_bit_for_bit(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    context = Drawn()
    run(tiny_qwen, make_cache(), tmp_path / "whole", context, validation_prompts="a cat", sample_steps=2)
    file = safetensors.torch.load_file(tmp_path / "whole/step-6.safetensors")
    kept = safetensors.torch.load_file(tmp_path / "whole/checkpoints/step-00000006/tensors.safetensors")
    trained = {name.removeprefix("trainable/"): v for name, v in kept.items() if name.startswith("trainable/")}
    z = {name.removeprefix("optimizer/").removesuffix("/z"): v for name, v in kept.items() if name.endswith("/z")}
    assert z.keys() <= trained.keys()
    average = {name: v.lerp(z[name], 1 - 1 / 0.9) if name in z else v for name, v in trained.items()}
    assert any(not torch.equal(average[name], trained[name]) for name in average)
    assert {name: v.tolist() for name, v in context.weights[6].items()} == {n: v.tolist() for n, v in average.items()}
    written, meant = (Counter(v.numpy().tobytes() for v in values.values()) for values in (file, average))
    assert not meant - written  # the file holds those without a gradient too

    run(tiny_qwen, make_cache(), tmp_path / "parts", max_steps=2)
    run(tiny_qwen, make_cache(), tmp_path / "parts", save_steps=1, max_steps=3)
    run(tiny_qwen, make_cache(), tmp_path / "parts", validation_steps=4)
    for name in ("step-6.safetensors", "checkpoints/step-00000006/tensors.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_schedule_free_run_goes_on_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    assert runs(tmp_path / "whole", **OPTIONS) == [0], runs.messages()
    assert runs(tmp_path / "killed", kill={"step": 4}, **OPTIONS) == [-9]
    assert runs(tmp_path / "killed", **OPTIONS) == [0]
    for name in ("step-6.safetensors", "checkpoints/step-00000006/tensors.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name in ("loss", "validation_loss"):
        first, second = ([line[name] for line in read_metrics(str(tmp_path / run))] for run in ("whole", "killed"))
        assert first == second and len(first) == 6


def test_two_averages_are_refused(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    with pytest.raises(OptimizerError, match="--ema_decay and ScheduleFreeSGD both average"):
        run(tiny_qwen, make_cache(), tmp_path, ema_decay=0.9)
