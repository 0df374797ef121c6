"""What is reported of a pool."""

from __future__ import annotations

import pytest

from ray_diffsynth.preprocess import metrics
from ray_diffsynth.preprocess.monitor import Counts


def test_metrics_follow_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, float] = {}

    class Metric:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name = name

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert tags == {"group": "vae"}

        def inc(self, value: float) -> None:
            told[self.name] = told.get(self.name, 0) + value

        def set(self, value: float) -> None:
            told[self.name] = value

    monkeypatch.setattr(metrics, "Counter", Metric)
    monkeypatch.setattr(metrics, "Gauge", Metric)
    pool_metrics = metrics.PoolMetrics("vae", total=100)
    for counts in (Counts(), Counts(10, 0, 500), Counts(40, 2, 2000), Counts(40, 2, 2000)):
        rate = pool_metrics.update(counts)
    assert rate > 0
    assert told.pop("ray_diffsynth_samples_per_second") == rate
    assert told == {
        "ray_diffsynth_encoded_samples": 40,
        "ray_diffsynth_quarantined_samples": 2,
        "ray_diffsynth_cache_bytes": 2000,
        "ray_diffsynth_remaining_samples": 58,
    }
