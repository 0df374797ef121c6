"""Reading ahead, and the order of samples."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.data.epoch_order import EpochOrder
from ray_diffsynth.training.data.loader import MicrobatchLoader
from ray_diffsynth.training.data.opening import open_data
from ray_diffsynth.training.data.source import CacheSource, DatasetSource, SourceError, prefetch
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config


def test_prefetch_keeps_the_order_and_reads_ahead() -> None:
    started: list[int] = []
    ahead = threading.Event()

    def fetch(item: int) -> int:
        started.append(item)
        if len(started) == 5:
            ahead.set()
        time.sleep(0.002 * (item % 3))
        return item * 10

    read = prefetch(range(20), fetch, depth=4, threads=3)
    assert next(read) == (0, 0)
    assert ahead.wait(300) and len(started) <= 6  # the one taken, four ahead
    assert list(read) == [(i, 10 * i) for i in range(1, 20)]


def test_prefetch_raises_where_the_item_would_come_and_ends_its_threads() -> None:
    def fetch(item: int) -> int:
        if item == 3:
            raise SourceError("item 3")
        return item

    read = prefetch(range(9), fetch, depth=4, threads=2)
    assert [next(read)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(SourceError, match="item 3"):
        next(read)
    other = prefetch(range(9), lambda i: i, depth=2, threads=2)
    next(other)
    other.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_dataset_and_cache_have_one_order(
    tiny_qwen: Path, images: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    cache = open_data(RunPlan.resolve(make_config(tiny_qwen, make_cache(), tmp_path)))
    whole = open_data(RunPlan.resolve(make_config(tiny_qwen, images, tmp_path, task="sft")))
    assert isinstance(cache, CacheSource)
    assert isinstance(whole, DatasetSource)
    assert list(cache.sample_ids) == list(whole.sample_ids)
    assert dict(cache.buckets) == dict(whole.buckets) == {"32x64": range(4), "64x64": range(4, 10)}
    assert set(cache.fetch([0])[0]) == {"input_latents", "prompt_embeds"}
    (sample,) = whole.fetch([0])
    assert sample["input_image"].size == (64, 32)
    assert (sample["height"], sample["width"]) == (32, 64)


def test_a_dataset_leaves_out_what_cannot_be_used(tiny_qwen: Path, images: Path, tmp_path: Path) -> None:
    table = (images / "metadata.csv").read_text().splitlines()
    rows = [table[0], *(f"{images}/{line}" for line in table[1:3]), "absent.png,a picture that is not there"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    source = open_data(RunPlan.resolve(make_config(tiny_qwen, tmp_path, tmp_path / "out", task="sft")))
    assert isinstance(source, DatasetSource)
    assert len(source.sample_ids) == 2
    assert [sample_id for sample_id, _ in source.rejected] == ["absent.png"]


class Numbers:
    """Rows that are their own content."""

    def __init__(self, **buckets: range) -> None:
        self.buckets = buckets
        self.sample_ids: Sequence[str] = [str(i) for rows in buckets.values() for i in rows]
        self.identity = "numbers"

    def fetch(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [{"row": row} for row in rows]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_workers_together_see_every_virtual_rank_of_every_step(world_size: int) -> None:
    source = Numbers(**{"64x64": range(0, 30), "64x128": range(30, 47)})
    loader = MicrobatchLoader(source, seed=3, batch_size=2, virtual_ranks=3, repeat=1)
    start, stop = 2, 2 * loader.steps_per_epoch + 1
    rows_of = {}
    for rank in range(world_size):
        for microbatch, samples in loader.read(start, stop, rank, world_size, threads=2):
            assert [sample["row"] for sample in samples] == list(microbatch.rows)
            assert [key.sample_id for key in microbatch.keys] == [str(row) for row in microbatch.rows]
            rows_of[microbatch.step, microbatch.virtual_rank] = microbatch.rows
    assert set(rows_of) == {(step, virtual_rank) for step in range(start, stop) for virtual_rank in range(3)}
    for (step, virtual_rank), rows in rows_of.items():
        order = loader.order(step // loader.steps_per_epoch)
        assert order.rows[step % loader.steps_per_epoch, virtual_rank].tolist() == list(rows)


def test_the_next_epochs_order_is_made_beside_the_training() -> None:
    made: dict[int, str] = {}

    class Noting(MicrobatchLoader):
        def order(self, epoch: int) -> EpochOrder:
            order = super().order(epoch)
            made[epoch] = threading.current_thread().name
            return order

    loader = Noting(Numbers(**{"64x64": range(8)}), seed=0, batch_size=1, virtual_ranks=1, repeat=1)
    read = loader.microbatches(0, 24, 0, 1)
    assert next(read).step == 0
    while 1 not in made:  # as long as the test may last
        time.sleep(0.01)
    assert sorted(made) == [0, 1] and threading.current_thread().name not in made.values()
    assert [microbatch.epoch for microbatch in read] == [0] * 7 + [1] * 8 + [2] * 8
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_a_damaged_cache_stops_the_run_and_names_the_file(make_cache: CacheMaker, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(make_cache(), tmp_path / "cache"))
    victim = sorted((copy / "vae").glob("*.parquet"))[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    source = CacheSource(CacheReader(str(copy)), torch.float32)
    with pytest.raises(CacheError, match=victim.name):
        source.fetch([0])
