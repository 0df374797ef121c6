"""Key and encoded value of a tiny sample of each family belong together: neither changes without the other.

With UPDATE_GOLDEN_KEYS=1 in the environment this test writes golden_keys.json anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ray_diffsynth.models.fingerprint import SKETCH
from ray_diffsynth.models.locate import locate_model
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.stages import plan_stages
from ray_diffsynth.plan.cache_keys import digest, plan_group
from ray_diffsynth.tasks import SFT
from ray_diffsynth.training.module import DiffusionTrainingModule
from tests.families.cases import FamilyCase

GOLDEN = Path(__file__).with_name("golden_keys.json")
TOLERANCE = 1e-3
"""Other CPUs round otherwise; a changed value is farther off."""


def described(value: Any) -> dict[str, Any]:
    """Shape, statistics and some elements of a tensor."""
    flat = value.detach().float().flatten()
    some = flat[:: max(1, len(flat) // 8)][:8]
    numbers = [flat.mean(), flat.std(), flat.abs().max(), *some]
    return {"shape": list(value.shape), "numbers": [round(float(number), 5) for number in numbers]}


def same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return before.keys() == now.keys() and all(
        before[name]["shape"] == now[name]["shape"]
        and torch.allclose(
            torch.tensor(before[name]["numbers"]), torch.tensor(now[name]["numbers"]), atol=TOLERANCE, rtol=TOLERANCE
        )
        for name in now
    )


def encoded(case: FamilyCase, pipe: BasePipeline, root: Path) -> dict[str, Any]:
    """Group -> its key, without the weights (whose random numbers differ by CPU in the last bit), parts and values."""
    row = case.inputs(1)
    module = DiffusionTrainingModule(pipe, SFT(), trained=["dit"], inputs=tuple(row), split=False)
    module.settings.update(case.settings)
    values = module.encode(row)
    found = {}
    for group in plan_stages(pipe, SFT(), ["dit"], tuple(row)).groups:
        plan = plan_group(
            pipe, locate_model(str(root)), group, sample_inputs=tuple(row), file_params=pipe.file_params,
            dtype="float32", settings=module.settings,
        )  # fmt: skip
        parts = {name: text for name, text in plan.parts.items() if not name.startswith((SKETCH, "weights:"))}
        tensors = {name: values[name] for name in group.parameters if isinstance(values[name], torch.Tensor)}
        found[group.name] = {
            "key": digest(parts),
            "parts": parts,
            "values": {name: described(value) for name, value in tensors.items()},
        }
    return found


def test_key_and_value_change_together(case: FamilyCase, pipe: BasePipeline, root: Path) -> None:
    now = encoded(case, pipe, root)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN_KEYS"):
        GOLDEN.write_text(json.dumps({**golden, case.family: now}, indent=1, sort_keys=True) + "\n")
        return
    before = golden[case.family]
    assert before.keys() == now.keys()
    for name, group in now.items():
        problem = verdict(f"{case.family}/{name}", before[name], group)
        assert problem is None, problem


def verdict(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What is wrong, and what to do."""
    unchanged = same(before["values"], now["values"])
    if before["key"] == now["key"]:
        return (
            None
            if unchanged
            else (
                f"{name}: the encoded value changed and the key did not, so that old rows would be trained on; raise "
                "the version of the unit, pipeline or transform that changed (or undo it), then UPDATE_GOLDEN_KEYS=1"
            )
        )
    old, new = before["parts"], now["parts"]
    changed = sorted(part for part in {*old, *new} if old.get(part) != new.get(part))
    if unchanged:
        return (
            f"{name}: the key changed ({', '.join(changed)}) and the value did not, so that all would be encoded "
            "again for nothing; undo it, or for a library: add its minor version to those that agree in "
            "plan/library_versions.py. Where the key has to change, UPDATE_GOLDEN_KEYS=1"
        )
    return f"{name}: key ({', '.join(changed)}) and value both changed; if that is meant, UPDATE_GOLDEN_KEYS=1"


def test_a_change_of_one_without_the_other_is_found() -> None:
    group = {"key": "k", "parts": {"unit:A": "v1"}, "values": {"x": described(torch.linspace(0, 1, 20))}}
    other = {"x": described(torch.linspace(0, 1.1, 20))}
    assert verdict("f/g", group, {**group, "values": {"x": described(torch.linspace(0, 1, 20) + 1e-5)}}) is None
    assert "raise the version" in str(verdict("f/g", group, {**group, "values": other}))
    again = {**group, "key": "l", "parts": {"unit:A": "v2"}}
    assert "unit:A" in str(verdict("f/g", group, again)) and "for nothing" in str(verdict("f/g", group, again))
    assert "both changed" in str(verdict("f/g", group, {**again, "values": other}))
