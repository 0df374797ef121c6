"""The pool: how many actors, work on several of them, and an item that kills, which costs no other item its chance."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.generate import pool
from ray_diffsynth.generate.painter import PainterSpec
from ray_diffsynth.generate.plan import Item
from ray_diffsynth.generate.pool import PoolSize, paint_all, pool_size
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.ray_session import ClusterError


@pytest.mark.parametrize(
    ("cluster", "workers", "resources", "items", "expected"),
    [
        ((8, 0), 0, None, 9, PoolSize(1, 8, 0, {})),
        ((8, 0), 2, None, 9, PoolSize(2, 4, 0, {})),
        ((8, 4), 0, None, 9, PoolSize(4, 1, 1, {})),
        ((8, 4), 0, None, 3, PoolSize(3, 1, 1, {})),
        ((8, 4), 2, None, 9, PoolSize(2, 1, 1, {})),
        ((8, 4), 0, {"GPU": 0.5}, 99, PoolSize(8, 1, 0.5, {})),
        ((8, 4), 0, {"GPU": 2, "CPU": 3, "big": 1}, 9, PoolSize(2, 3, 2, {"big": 1})),
        ((8, 4), 0, {"GPU": 0}, 9, PoolSize(1, 8, 0, {})),
        ((8, 4), 3, {"CPU": 2}, 9, PoolSize(3, 2, 1, {})),
    ],
)
def test_how_many_actors(
    cluster: tuple[float, float],
    workers: int,
    resources: dict[str, float] | None,
    items: int,
    expected: PoolSize,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "cluster_devices", lambda: cluster)
    assert pool_size(workers, resources, items) == expected


@pytest.mark.parametrize(("workers", "resources"), [(5, None), (1, {"GPU": 5}), (3, {"CPU": 3}), (9, {"GPU": 0})])
def test_what_does_not_fit_is_refused(
    workers: int, resources: dict[str, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "cluster_devices", lambda: (8, 4))
    with pytest.raises(ClusterError, match="do not fit a cluster of 8 CPU and 4 GPU"):
        pool_size(workers, resources, 9)


def items(count: int) -> list[Item]:
    return [Item(f"pictures/{number}.png", f"picture {number}", number, 1.0, ()) for number in range(count)]


def spec(output: Path) -> PainterSpec:
    return PainterSpec("qwen_image", ModelSource("", ""), "float32", (), str(output), 16.0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_two_actors_share_the_work_and_one_item_that_kills_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Drawing(pool.PainterActor):
        """No model: notes who draws what. Item 2 kills its process, item 5 the first time that it is tried."""

        def load(self) -> None:
            pass

        def paint(self, item: Item) -> str:
            output = Path(self.spec.output_path)
            with open(output / f"{item.seed}.tries", "a") as file:
                file.write(f"{os.getpid()}\n")
            tries = len((output / f"{item.seed}.tries").read_text().splitlines())
            if item.seed == 2 or (item.seed == 5 and tries == 1):
                os.kill(os.getpid(), 9)
            if item.seed == 6:
                raise RuntimeError("no memory")
            time.sleep(0.3)
            return item.file

    monkeypatch.setattr(pool, "PainterActor", Drawing)
    done: list[int] = []
    painted = paint_all(items(9), spec(tmp_path), PoolSize(2, 1, 0, {}), done.append)
    assert painted.failures == {
        "pictures/2.png": "its process died each time that it was tried",
        "pictures/6.png": "RuntimeError: no memory",
    }
    assert len(done) == 9 and painted.seconds > 0
    tries = {number: (tmp_path / f"{number}.tries").read_text().split() for number in range(9)}
    # What was done just before the process died may be done again: its result may be lost with the process. It is then
    # the one to suspect, so that what killed has a try more: with each of the first two actors, which hold two items.
    most = {2: pool.TRIES + 2, 5: 3}
    assert all(len(tries[n]) <= most.get(n, 2) for n in range(9)), tries
    assert set(tries[0]).isdisjoint(tries[1]), "two processes work at the same time"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_process_that_dies_while_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Heavy(pool.PainterActor):
        def load(self) -> Any:
            os.kill(os.getpid(), 9)

    monkeypatch.setattr(pool, "PainterActor", Heavy)
    with pytest.raises(ClusterError, match="died while it loaded the model"):
        paint_all(items(1), spec(tmp_path), PoolSize(1, 1, 0, {}))
