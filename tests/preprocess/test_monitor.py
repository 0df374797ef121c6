"""A shard that has killed as many processes as a pass allows is not begun again, whatever Ray does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from ray_diffsynth.preprocess import decode, encoder, monitor
from ray_diffsynth.preprocess.attempts import Attempt
from ray_diffsynth.preprocess.datasink import ShardSink
from ray_diffsynth.preprocess.decode import Decoder
from ray_diffsynth.preprocess.encoder import Encoder
from ray_diffsynth.preprocess.monitor import OutOfTries, add_counts, attempt_at
from ray_diffsynth.preprocess.monitor_state import Counts, Journal
from tests.preprocess.failing import Bench

TRIES = 3


class Here:
    """A monitor without Ray, to which each attempt comes from another process."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.report = SimpleNamespace(remote=journal.report)
        self.running = SimpleNamespace(remote=lambda *_: None)

    def die_at(self, shard: str, stage: str) -> None:
        """As often as a pass allows."""
        for number in range(TRIES):
            self.journal.report("begin", Attempt(shard, stage, "n", f"dead {stage} {number}", 0))  # type: ignore[arg-type]

    def open_at(self, shard: str) -> list[str]:
        return [item.attempt.process for item in self.journal.state.unfinished([shard])[0]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    workers = itertools.count()
    context = SimpleNamespace(
        get_node_id=lambda: "n",
        get_worker_id=lambda: f"process {next(workers)}",
        get_actor_id=lambda: "a",
        current_actor=None,
    )
    fake = SimpleNamespace(get=lambda value: value, get_runtime_context=lambda: context)
    monkeypatch.setattr(monitor, "ray", fake)
    monkeypatch.setattr(encoder, "ray", fake)
    yield Here(Journal(str(tmp_path / "journal")))


def test_as_many_tries_as_a_pass_allows(here: Here) -> None:
    for _ in range(TRIES):
        with attempt_at(here, "s", "decode", TRIES) as attempt:
            assert attempt is not None and here.open_at("s") == [attempt.process]
    assert here.open_at("s") == [], "what ended is no death"
    here.die_at("s", "decode")
    with pytest.raises(OutOfTries, match="3 processes died at s"), attempt_at(here, "s", "decode", TRIES):
        raise AssertionError("it was begun")
    assert len(here.open_at("s")) == TRIES, "what was not begun did not die either"
    with (
        attempt_at(here, "s", "encode", TRIES),
        attempt_at(here, "t", "decode", TRIES),
        attempt_at(here, "s", "decode"),
    ):
        assert len(here.open_at("s")) == TRIES + 2
    here.journal.report("begin_pass")
    with attempt_at(here, "s", "decode", TRIES):
        assert len(here.open_at("s")) == TRIES + 1


def test_each_stage_passes_on_what_killed_the_ones_before(
    here: Here, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = bench.decode()
    name = row["name"]
    for stage in ("decode", "encode", "write"):
        here.die_at(name, stage)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was begun")

    monkeypatch.setattr(decode, "load_inputs", never)
    decoded = Decoder(bench.spec, here, None, TRIES)(row)
    assert decoded["given_up"] and decoded["inputs"] == b""
    one = Encoder(bench.spec, here, TRIES)
    monkeypatch.setattr(encoder, "encode_samples", never)
    encoded = one(row)
    assert encoded["given_up"] and one(decoded) == decoded
    sink = ShardSink("/nowhere", "vae", ("input_latents",), "none", here, None, TRIES)
    monkeypatch.setattr(sink, "_write", never)
    assert sink.write([pa.Table.from_pylist([row, encoded])], None) == []
    assert not here.journal.state.counts.fatal, "no other shard suffers"


def test_counts_come_in(here: Here) -> None:
    add_counts(here, 8, 1, 100)
    add_counts(here, 8, 0, 100)
    assert here.journal.state.counts == Counts(16, 1, 200)
