"""Which machines live, where Ray reports a dead one late: each is asked, until it answers or is declared dead."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import WorkerCrashedError

from ray_diffsynth.cluster import living as module
from ray_diffsynth.cluster.living import living


class PlayedCluster:
    """Machines that answer at the n-th look (`answers`), or are declared dead at it (`declared`), or neither.

    `own` is the driver's. A machine in `crashes` first loses so many of the processes that it is asked by.
    """

    def __init__(
        self, answers: dict[str, int], declared: dict[str, int] | None = None, crashes: dict[str, int] | None = None
    ) -> None:
        self.answers, self.declared, self.crashes = answers, declared or {}, crashes or {}
        self.look = 0
        self.asked: list[str] = []
        self.cancelled: list[str] = []

    def alive_nodes(self) -> dict[str, dict[str, float]]:
        known = {"own", *self.answers, *self.declared}
        return {node: {} for node in known if self.look < self.declared.get(node, 1 << 30)}

    def remote(self, **_: Any) -> Callable[[Any], Any]:
        def ask(strategy: Any) -> str:
            self.asked.append(strategy.node_id)
            return f"{strategy.node_id}#{len(self.asked)}"

        return lambda function: SimpleNamespace(
            options=lambda *, scheduling_strategy: SimpleNamespace(remote=lambda: ask(scheduling_strategy))
        )

    def wait(self, references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        self.look += 1
        done = [name for name in references if self.answers.get(name.partition("#")[0], 1 << 30) <= self.look]
        return done, [name for name in references if name not in done]

    def get(self, reference: str, timeout: float) -> None:
        node = reference.partition("#")[0]
        if self.crashes.get(node):
            self.crashes[node] -= 1
            raise WorkerCrashedError

    def cancel(self, reference: str, force: bool) -> None:
        self.cancelled.append(reference.partition("#")[0])

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "own")


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[PlayedCluster], PlayedCluster]:
    def call(cluster: PlayedCluster) -> PlayedCluster:
        monkeypatch.setattr(module, "ray", cluster)
        monkeypatch.setattr(module, "alive_nodes", cluster.alive_nodes)
        monkeypatch.setattr(
            module, "NodeAffinitySchedulingStrategy", lambda node, soft: SimpleNamespace(node_id=node, soft=soft)
        )
        monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)
        return cluster

    return call


Play = Callable[[PlayedCluster], PlayedCluster]


def test_the_drivers_own_machine_need_not_be_asked(play: Play) -> None:
    cluster = play(PlayedCluster({}))
    assert living({"own"}) == {"own"} and cluster.asked == []
    assert living(set()) == set()


def test_one_that_is_dead_and_not_yet_declared_so_is_waited_for(play: Play) -> None:
    """Ray says of `late` that it lives, at the first looks."""
    cluster = play(PlayedCluster({"slow": 3, "quick": 1}, declared={"late": 20, "gone": 0}))
    assert living({"own", "slow", "quick", "late", "gone"}) == {"own", "slow", "quick"}
    assert sorted(cluster.asked) == ["late", "quick", "slow"] and cluster.look == 20
    assert cluster.cancelled == ["late"]


def test_a_question_that_dies_is_asked_again(play: Play) -> None:
    cluster = play(PlayedCluster({"a": 1}, crashes={"a": 2}))
    assert living({"a"}) == {"a"} and cluster.asked == ["a"] * 3


def test_one_that_neither_answers_nor_dies_is_taken_for_dead_and_told(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    play(PlayedCluster({"a": 1}, declared={"silent": 1 << 20}))
    with caplog.at_level(logging.WARNING):
        assert living({"a", "silent"}, seconds=0) == {"a"}
    assert "1 machines neither answer nor are declared dead" in caplog.text and "silent" in caplog.text
