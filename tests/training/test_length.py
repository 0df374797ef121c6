"""How long a run is: max_steps alone, num_epochs alone, both, neither."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ray_diffsynth.training import local
from ray_diffsynth.training.checkpoint import list_checkpoints
from ray_diffsynth.training.length import describe_length, total_steps
from ray_diffsynth.training.report.metrics_log import read_metrics
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config


@pytest.mark.parametrize(
    ("num_epochs", "max_steps", "steps"),
    [(None, None, 5), (None, 3, 3), (None, 17, 17), (3, None, 15), (3, 7, 7), (3, 30, 15), (3, 15, 15), (1, 5, 5)],
)
def test_the_steps_of_a_run(num_epochs: int | None, max_steps: int | None, steps: int) -> None:
    assert total_steps(num_epochs, max_steps, per_epoch=5) == steps
    if num_epochs and max_steps:
        assert f"{steps} steps" in describe_length(num_epochs, max_steps, 5)


def test_max_steps_alone_decides_the_epochs(
    tiny_qwen: Path,
    make_cache: CacheMaker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Five steps an epoch: twelve steps end within the third. The schedule falls over all of them."""
    options = {"batch_size": 2, "max_steps": 12, "lr_scheduler": "linear", "log_with": "none"}
    with caplog.at_level(logging.INFO):
        local.run(make_config(tiny_qwen, make_cache(), tmp_path / "steps", **options))
    assert "trained 12 of 12 steps" in capsys.readouterr().out and "num_epochs" not in caplog.text
    names = {path.name for path in (tmp_path / "steps").glob("*.safetensors")}
    assert names == {"epoch-0.safetensors", "epoch-1.safetensors", "step-12.safetensors"}
    lines = read_metrics(str(tmp_path / "steps"))
    assert [(line["step"], line["steps"], line["epoch"]) for line in lines] == [
        (n, 12, (n - 1) // 5) for n in range(1, 13)
    ]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2 * (1 - n / 12) for n in range(12)])
    assert list_checkpoints(str(tmp_path / "steps"))[-1] == "step-00000012"
    assert json.loads((tmp_path / "steps/report.json").read_text())["counts"]["steps_total"] == 12


def test_of_both_the_smaller_counts_and_it_is_said(
    tiny_qwen: Path,
    make_cache: CacheMaker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, (num_epochs, max_steps, end) in enumerate([(1, 30, "num_epochs"), (4, 3, "max_steps")]):
        caplog.clear()
        options = {"batch_size": 2, "num_epochs": num_epochs, "max_steps": max_steps, "log_with": "none"}
        with caplog.at_level(logging.INFO):
            local.run(make_config(tiny_qwen, make_cache(), tmp_path / str(number), **options))
        steps = min(5 * num_epochs, max_steps)
        assert f"trained {steps} of {steps} steps" in capsys.readouterr().out
        assert f"num_epochs={num_epochs}" in caplog.text and f"max_steps={max_steps}" in caplog.text
        assert f"the run ends after {steps} steps; leave {end} out" in caplog.text
