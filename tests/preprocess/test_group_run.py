"""What follows a group of encoders through a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.plan.cache_keys import GroupPlan
from tests.preprocess.conftest import Stage1
from tests.preprocess.counting import build_model, digest


@pytest.mark.parametrize("pools", [None, {}], ids=["one group after another", "side by side"])
def test_the_key_of_a_row_is_computed_once(
    tmp_path: Path, few: Path, inline: Stage1, monkeypatch: pytest.MonkeyPatch, pools: Any
) -> None:
    """Planning, the quarantine, the commit and the warnings all ask for it."""
    asked: Counter[tuple[str, str]] = Counter()
    real = GroupPlan.key

    def key(self: GroupPlan, inputs: Mapping[str, Any]) -> str:
        found = real(self, inputs)
        asked[self.name, found] += 1
        return found

    monkeypatch.setattr(GroupPlan, "key", key)
    bad = digest(np.asarray(Image.open(few / "0003.png").convert("RGB")))
    model, cache = build_model(tmp_path / "model", too_big=[bad], words=2), tmp_path / "cache"
    for options in ({"dry_run": True}, {"max_quarantine": 1}, {}, {"retry_quarantined": True}, {"dry_run": True}):
        asked.clear()
        inline(model, few, cache, pools=pools, **options)
        assert Counter(group for group, _ in asked) == {"vae": 12, "text_encoder": 13}, "with the empty caption"
        assert set(asked.values()) == {1}
