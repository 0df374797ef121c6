"""The pool: work on several actors, and an item that kills, which costs no other item its chance."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.cluster.generators import GeneratorPool
from ray_diffsynth.cluster.session import ClusterError
from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.generate import pool
from ray_diffsynth.generate.items import Item
from ray_diffsynth.generate.pool import paint_all
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.plan.run_plan import GeneratePlan


def items(count: int) -> list[Item]:
    return [Item(f"pictures/{number}.png", f"image {number}", number, 1.0, ()) for number in range(count)]


def plan(output: Path) -> GeneratePlan:
    config = GenerateConfig(model="m", prompt="a cat", output_path=str(output))
    return GeneratePlan(config, str(output), "qwen_image", ModelSource("", ""), {}, (), ())


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
            output = Path(self.plan.output_path)
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
    painted = paint_all(items(9), plan(tmp_path), GeneratorPool(2, 1, 0, {}), done.append)
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
        paint_all(items(1), plan(tmp_path), GeneratorPool(1, 1, 0, {}))
