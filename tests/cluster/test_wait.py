"""Waiting for machines: the cluster, its autoscaler and the clock are given here."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from ray_diffsynth.cluster import wait
from ray_diffsynth.cluster.address import ClusterError
from ray_diffsynth.cluster.demand import Ask, Demand
from ray_diffsynth.cluster.nodes import Cluster, Process
from ray_diffsynth.cluster.wait import sized_when_there, wait_for
from ray_diffsynth.ray_compat import Autoscaler

WANTED = Demand((Ask("actors", Process({"GPU": 1.0}, {"stage": "encode"}), 2, 4),))
ACTORS = "2 to 4 actors of 1 GPU with stage=encode"
HEAD = Cluster({"head": {"CPU": 0.0}})


def encode_nodes(number: int, gpus: float = 1.0) -> Cluster:
    names = [f"e{count}" for count in range(number)]
    return Cluster(
        {"head": {"CPU": 0.0}, **{name: {"CPU": 4.0, "GPU": gpus} for name in names}},
        labels={name: {"stage": "encode"} for name in names},
    )


class Scene:
    """Looks at the cluster, in order, the last of which stays: what is there, and what is free of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks: list[tuple[Cluster, Cluster]] = [(HEAD, HEAD)]
        self.scaling: Autoscaler | None = Autoscaler(("encode",))
        self.now = 0.0
        self.asked: list[Demand] = []
        self.requester = SimpleNamespace(ask=self.asked.append)
        monkeypatch.setattr(wait, "joined_cluster", lambda: self.looks[0][0])
        monkeypatch.setattr(wait, "unused", lambda cluster: self.looks[0][1])
        monkeypatch.setattr(wait, "autoscaler", lambda: self.scaling)
        monkeypatch.setattr(wait, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if len(self.looks) > 1:
            self.looks.pop(0)

    def wait(self, minutes: float = 30.0) -> bool:
        return wait_for(WANTED, self.requester, minutes=minutes)  # type: ignore[arg-type]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_it_asks_for_the_most_and_starts_with_the_least(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.looks = [*[(HEAD, HEAD)] * 8, *[(encode_nodes(1),) * 2] * 8, (encode_nodes(2),) * 2]
    assert scene.wait() and all(demand == WANTED for demand in scene.asked) and len(scene.looks) == 1
    lines = [record.message for record in caplog.records]
    assert lines == [
        f"waiting for machines for 5 s (at most 30 min): {ACTORS}: 0 would fit; there is no such machine; "
        "starting: encode",
        f"waiting for machines for 8 s (at most 30 min): {ACTORS}: 1 would fit; free are 1 of 1 GPU on 1 machines; "
        "starting: encode",
    ]


def test_what_is_there_is_not_asked_for(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.looks = [(encode_nodes(2),) * 2]
    assert scene.wait() and not scene.asked and not caplog.records and scene.now == 0


def test_busy_machines_are_told_apart(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.scaling = None
    scene.looks = [*[(encode_nodes(2), encode_nodes(2, 0.0))] * 70, (encode_nodes(2),) * 2]
    assert scene.wait() and not scene.asked
    assert len(caplog.records) == 2 and all("others have the machines" in r.message for r in caplog.records)
    scene.looks = [(encode_nodes(1),) * 2]
    with pytest.raises(ClusterError, match="too small and has no autoscaler: 2 to 4 actors.*1 would fit.*add machines"):
        scene.wait()


def test_a_wait_has_an_end(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.scaling = Autoscaler((), ("encode (no quota)",))
    with pytest.raises(ClusterError, match="after 2 minutes there is still no room.*not be started: encode .no q"):
        scene.wait(minutes=2)
    assert 120 <= scene.now < 125
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2  # at 5 and at 65 s
    assert not wait_for(WANTED, scene.requester, minutes=2, stopped=lambda: True)  # type: ignore[arg-type]


def test_the_size_is_that_of_the_machines_that_have_come(scene: Scene) -> None:
    scene.looks = [*[(HEAD, HEAD)] * 3, (encode_nodes(3),) * 2]
    cancelled: list[float] = []
    scene.requester.cancel = lambda: cancelled.append(scene.now)
    sizes = sized_when_there(
        lambda cluster: len(cluster.nodes),
        lambda size: WANTED if size == 1 else Demand(()),
        scene.requester,  # type: ignore[arg-type]
        minutes=30,
    )
    assert sizes == 4 and scene.asked == [WANTED] * 3 and cancelled == [scene.now]
