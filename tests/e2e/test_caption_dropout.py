"""The split stays exact with dropped captions: the empty one of the cache is what the unsplit run encodes for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_diffsynth.training.report.metrics_log import read_metrics
from tests.e2e.conftest import train_config
from tests.training.helpers import train_here

pytestmark = pytest.mark.ray


def test_split_equals_unsplit(tiny_qwen: Path, dataset: Path, fp32_cache: Path, tmp_path: Path) -> None:
    options = {"batch_size": 2, "max_steps": 5, "log_with": "none"}
    runs = {
        "split": (fp32_cache, {"caption_dropout": 0.5}),
        "whole": (dataset, {"caption_dropout": 0.5, "task": "sft"}),
        "never": (fp32_cache, {}),
    }
    for name, (base, changes) in runs.items():
        train_here(train_config(tiny_qwen, base, tmp_path / name, **options, **changes))
    losses = {name: [line["loss"] for line in read_metrics(str(tmp_path / name))] for name in runs}
    assert losses["split"] == losses["whole"] != losses["never"]
    files = [(tmp_path / name / "step-5.safetensors").read_bytes() for name in ("split", "whole")]
    assert files[0] == files[1]
