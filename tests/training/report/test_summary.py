"""Which LoRA a report names: the one that the run wrote last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_diffsynth.training import local
from ray_diffsynth.training.export import newest_file
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config


def named(output: Path) -> tuple[str, bool]:
    """The file in report.json, and whether report.html names it too."""
    file = json.loads((output / "report.json").read_text())["lora"]["file"]
    return file, f'weight_name="{file}"' in (output / "report.html").read_text().replace("&#34;", '"')


def test_epochs_and_steps_are_told_apart(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    """Five steps an epoch: epoch-1 (after ten steps) is later than step-7, and step-12 later than both."""
    options: dict[str, Any] = {"batch_size": 2, "log_with": "none"}
    for changes, file in (
        ({"max_steps": 7, "save_steps": 7}, "step-7.safetensors"),
        ({"max_steps": 10}, "epoch-1.safetensors"),
        ({"max_steps": 12}, "step-12.safetensors"),
        ({"num_epochs": 3, "save_steps": None}, "epoch-2.safetensors"),
    ):
        local.run(make_config(tiny_qwen, make_cache(), tmp_path, **{**options, **changes}))
        assert named(tmp_path) == (file, True)


def test_the_newest_by_position(tmp_path: Path) -> None:
    for name in ("epoch-4", "step-100", "step-60", "step-100.ema", "step-100.text_encoder", "my-200", "step-x"):
        (tmp_path / f"{name}.safetensors").touch()
    found = [newest_file(str(tmp_path), per_epoch, until) for per_epoch, until in ((50, 999), (10, 999), (10, 55))]
    assert [Path(path or "").name for path in found] == [
        *("epoch-4.safetensors", "step-100.safetensors", "epoch-4.safetensors"),
    ]
    assert newest_file(str(tmp_path), 10, 49) is None
