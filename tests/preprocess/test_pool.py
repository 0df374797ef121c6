"""How pools share a cluster, and what is reported of them: pure, on clusters that are not there."""

from __future__ import annotations

from typing import Any

import pytest

from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.errors import ConfigError
from ray_diffsynth.preprocess import metrics, pool
from ray_diffsynth.preprocess.monitor import Counts
from ray_diffsynth.preprocess.pool import PoolSize, check_pools, pool_sizes
from ray_diffsynth.ray_session import ClusterError

GROUPS = ("vae", "text_encoder")


def sizes(
    monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, nodes: int = 1, **options: Any
) -> dict[str, PoolSize]:
    monkeypatch.setattr(pool, "alive_nodes", lambda: dict.fromkeys(range(nodes), {}))
    monkeypatch.setattr(pool, "cluster_devices", lambda: (cpus, gpus))
    return pool_sizes(PreprocessConfig(model="m", dataset_base_path="d", **options), GROUPS)


def reserved(found: dict[str, PoolSize]) -> tuple[float, float]:
    """CPUs and GPUs of the smallest pools, with one decode and one write task each."""
    cpus = sum(size.min_actors * size.actor_cpus + size.decode_cpus + size.write_cpus for size in found.values())
    return cpus, sum(size.min_actors * size.actor_gpus for size in found.values())


def test_one_group_after_another_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = sizes(monkeypatch, 16, 4)["vae"]
    assert (vae.min_actors, vae.max_actors, vae.actor_gpus) == (4, 4, 1.0)
    assert sizes(monkeypatch, 2, 0)["vae"].min_actors == 1


def test_when_half_of_the_machines_are_lost_decoding_still_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for nodes in (2, 4):
        size = sizes(monkeypatch, 2 * nodes, 0, nodes=nodes)["vae"]
        assert size.min_actors * size.actor_cpus + size.decode_cpus + size.write_cpus <= 2 * nodes / 2


@pytest.mark.parametrize(("cpus", "gpus"), [(2, 0), (4, 1), (16, 2), (64, 8)])
def test_default_pools_fit_side_by_side(monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float) -> None:
    found = sizes(monkeypatch, cpus, gpus, pools={})
    needed = reserved(found)
    assert needed[0] <= cpus and needed[1] <= gpus
    assert found["vae"].actor_gpus == {0: 0, 1: 0.5}.get(int(gpus), 1.0)


def test_each_pool_has_its_own_share_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = {"vae": {"num_gpus": 0.25, "batch_size": 4}, "text_encoder": {"num_gpus": 0.75, "max_size": 3}}
    found = sizes(monkeypatch, 16, 3, pools=pools, batch_size=2)
    assert (found["vae"].actor_gpus, found["vae"].batch_size, found["vae"].max_actors) == (0.25, 4, 1)
    text = found["text_encoder"]
    assert (text.actor_gpus, text.batch_size, text.min_actors, text.max_actors) == (0.75, 2, 1, 3)


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ({"vae": {"num_gpus": 0.6}, "text_encoder": {"num_gpus": 0.6}}, "need 1.2 GPU.*the cluster has 1"),
        ({"vae": {"num_cpus": 3}, "text_encoder": {"num_cpus": 1}}, "need 4 CPU.*decoding and writing"),
    ],
)
def test_pools_that_do_not_fit_say_so(monkeypatch: pytest.MonkeyPatch, pools: Any, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        sizes(monkeypatch, 4, 1, pools=pools)


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ({"vae": {"gpus": 1}}, "gpus is not known.*num_gpus"),
        ({"vae": {"batch_size": 0}}, "batch_size=0 is not a whole number"),
        ({"vae": {"min_size": 3, "max_size": 2}}, "min_size=3 is above max_size=2"),
    ],
)
def test_pools_that_make_no_sense(pools: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreprocessConfig(model="m", dataset_base_path="d", pools=pools)


def test_a_group_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="'vea' is no group.*vae"):
        check_pools(PreprocessConfig(model="m", dataset_base_path="d", pools={"vea": {}}), GROUPS)


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
