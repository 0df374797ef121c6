"""Sample images of every family: drawn as `jobs/generate.py` draws, in the size that the run trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.calling import image_params
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.build import build_module
from ray_diffsynth.training.report import drawing
from ray_diffsynth.training.report.drawing import SampleDrawer, run_frozen_units
from ray_diffsynth.training.report.sample_prompts import plan_samples
from tests.families.cases import FamilyCase, make_image
from tests.training.helpers import make_config

CPU = torch.device("cpu")


def test_they_are_those_of_generate(
    case: FamilyCase, root: Path, pipe: BasePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded once and drawn twice, with the LoRA of a run that begins: the images of the model as it came."""
    made: list[Any] = []
    keep = drawing._to_image
    monkeypatch.setattr(drawing, "_to_image", lambda result: keep(made.append(result) or result))
    needed = [name for name, is_needed in image_params(pipe).items() if is_needed]
    rows: list[dict[str, Any]] = [{"prompt": text, **dict.fromkeys(needed, f"{text}.png")} for text in ("a", "b")]
    for seed, text in enumerate("ab"):
        make_image(seed=seed).save(tmp_path / f"{text}.png")
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options: dict[str, Any] = {"height": 32, "width": 48, "sample_inference_steps": 2, "lora_target_modules": None}
    if pipe.video_params:
        options["num_frames"] = 5
    if "edit_image_auto_resize" in pipe.training_settings():
        options["pipeline_settings"] = {"edit_image_auto_resize": False}
    prompts = str(tmp_path / "prompts.jsonl")
    plan = RunPlan.resolve(make_config(root, tmp_path, tmp_path, task="sft", validation_prompts=prompts, **options))
    samples = plan_samples(plan)
    encoded = run_frozen_units(plan, samples, range(2), CPU)
    module, _ = build_module(plan, CPU)
    schedule = module.pipe.scheduler.timesteps.clone()
    draws = SampleDrawer(plan, module, samples, encoded)
    for _ in range(2):
        for number in range(2):
            draws.draw(number)
    draws.release()
    assert torch.equal(module.pipe.scheduler.timesteps, schedule) and module.pipe.scheduler.training
    settings = options.get("pipeline_settings", {})
    size = {name: options[name] for name in ("height", "width", "num_frames") if name in options}
    plain: Any = pipe
    for number, text in enumerate("ab"):
        given = {name: Image.open(tmp_path / f"{text}.png").convert("RGB") for name in needed}
        expected = plain(text, seed=number, num_inference_steps=2, **size, **settings, **given)
        for found in (made[number], made[2 + number]):
            assert np.array_equal(np.asarray(found), np.asarray(expected)), text
    assert np.asarray(made[0]).shape[:-3] == ((5,) if pipe.video_params else ())
