"""What a job asks of the autoscaler is there as long as it wants it, beside what others ask for."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_get

from ray_diffsynth.cluster import request
from ray_diffsynth.cluster.demand import Ask, Demand
from ray_diffsynth.cluster.nodes import Cluster, Process
from ray_diffsynth.cluster.request import Requester, requester
from ray_diffsynth.cluster.workers import WorkerGroup
from ray_diffsynth.ray_compat import Autoscaler, autoscaler, autoscaling_coordinator

# No node has this label, and nothing is ever started on a Ray of this machine.
ENCODE = Demand((Ask("actors", Process({"GPU": 1.0, "CPU": 0.5}, {"stage": "encode"}), 1, 2),))
SMALL = Demand((Ask("tasks", Process({"CPU": 1.0}), 1, 1),))


def asked() -> list[dict[str, Any]]:
    """What the autoscaler reads: the resources of each bundle that anybody wants."""
    return json.loads(_internal_kv_get("autoscaler_resource_request") or "[]")


@pytest.mark.ray
def test_a_request_is_taken_back_however_the_job_ends(local_ray: None) -> None:
    assert autoscaler() is None  # this Ray has none, though its head runs a monitor
    with pytest.raises(KeyboardInterrupt), requester("preprocess /a") as job:
        job.ask(ENCODE)
        assert [bundle for bundle in asked() if "GPU" in bundle] == [{"GPU": 1.0, "CPU": 0.5}] * 2
        raise KeyboardInterrupt
    assert not any("GPU" in bundle for bundle in asked())


@pytest.mark.ray
def test_jobs_do_not_overwrite_each_other_and_a_second_try_takes_over(local_ray: None) -> None:
    killed = Requester("preprocess /a")  # never closed
    killed.ask(ENCODE)
    with requester("train /b") as other, requester("preprocess /a") as again:
        other.ask(SMALL)
        assert len([bundle for bundle in asked() if "GPU" in bundle]) == 2 and {"CPU": 1.0} in asked()
        again.ask(SMALL)
        assert not any("GPU" in bundle for bundle in asked()), "the killed one's request stays beside that of its rerun"
    assert not asked()
    killed.ask(SMALL)  # it lives after all
    killed.close()
    assert not asked()


@pytest.mark.ray
def test_a_request_that_nobody_renews_ends(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_diffsynth.cluster.request.EXPIRE_SECONDS", 0.2)
    killed = Requester("preprocess /a")
    killed.ask(ENCODE)
    assert asked()
    time.sleep(0.3)
    coordinator = autoscaling_coordinator()
    ray.get(coordinator.get_reserved_resources.remote("any", recompute=True))  # what its clock does every 20 s
    assert not asked()
    killed.close()


class Cloud:
    """An autoscaler that has machines for so many actors, and takes what is asked whole or not at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.most, self.machines, self.asked = most, 0, 0
        monkeypatch.setattr(request, "autoscaler", lambda: Autoscaler())
        monkeypatch.setattr(request, "joined_cluster", self.cluster)
        monkeypatch.setattr(Requester, "_send", lambda requester, demand: self.send(demand))

    def cluster(self) -> Cluster:
        names = [f"e{number}" for number in range(self.machines)]
        return Cluster({n: {"GPU": 1.0} for n in names}, labels={n: {"stage": "encode"} for n in names})

    def send(self, demand: Demand) -> None:
        self.asked = len(demand.bundles())
        if self.asked <= self.most:
            self.machines = max(self.machines, self.asked)


@pytest.mark.parametrize(("most", "started"), [(16, 16), (12, 9), (3, 3), (2, 2)])
def test_what_is_too_much_as_a_whole_is_asked_for_in_part(
    monkeypatch: pytest.MonkeyPatch, most: int, started: int
) -> None:
    monkeypatch.setattr(Requester, "_keep", lambda self: None)
    monkeypatch.setattr(Requester, "cancel", lambda self: None)
    cloud = Cloud(monkeypatch, most)
    job = Requester("preprocess /a")
    job.ask(Demand((Ask("actors", Process({"GPU": 1.0}, {"stage": "encode"}), 2, 16),)))
    assert cloud.asked == 16
    for _ in range(12):
        job.renew()
    assert cloud.machines == cloud.asked == started
    for _ in range(8):
        job.renew()
    assert cloud.asked == 16, "the cloud may have room again, and is asked"


def test_beside_workers_that_train_nothing_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run that could have more workers than there may be machines keeps all other jobs waiting."""
    monkeypatch.setattr(Requester, "_keep", lambda self: None)
    cloud = Cloud(monkeypatch, 0)
    job = Requester("train /b")
    job.ask(WorkerGroup(2, 8, {"GPU": 1.0}, 8, selector={"stage": "train"}).demand(training=4))
    assert cloud.asked == 4
    for _ in range(12):
        job.renew()
    assert cloud.asked == 0
