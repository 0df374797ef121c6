"""What a monitor knows is the same whether or not its process was killed on the way, and whatever Ray told it twice."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_diffsynth.preprocess import monitor_state
from ray_diffsynth.preprocess.attempts import Attempt, Unfinished
from ray_diffsynth.preprocess.monitor_state import Counts, Journal, MonitorState

Report = tuple[Any, ...]


def attempt(number: int = 0, *, process: str = "p", shard: str = "s", stage: str = "decode") -> Attempt:
    return Attempt(shard, stage, "node", process, number)  # type: ignore[arg-type]


@st.composite
def stories(draw: st.DrawFn) -> list[Report]:
    """What three processes and the driver report, each in its own order, mixed."""
    told: list[list[Report]] = [[("begin_pass",)] * draw(st.integers(0, 2))]
    told.append([("give_up", reason) for reason in draw(st.lists(st.sampled_from(["disk full", "no model"])))])
    for process in ("p", "q", "r"):
        reports: list[Report] = []
        for number in range(draw(st.integers(0, 4))):
            stage = draw(st.sampled_from(["decode", "encode", "write"]))
            one = attempt(number, process=process, shard=draw(st.sampled_from("st")), stage=stage)
            reports.append(("begin", one))
            if stage == "encode":
                reports += [("begin_loading", f"actor {process}", "node", process), ("begin_batch", one, ["k1", "k2"])]
                reports += draw(st.sampled_from([[], [("loaded", f"actor {process}", process)]]))
            if stage == "write":
                reports.append(("add", process, number, *draw(st.tuples(*[st.integers(0, 9)] * 3))))
            reports.append(draw(st.sampled_from([("end", one), ("report_exit", one, "the device is lost")])))
        told.append(reports)
    mixed = []
    while any(told):
        mixed.append(draw(st.sampled_from([reports for reports in told if reports])).pop(0))
    return mixed


def state_after(reports: Sequence[Report]) -> MonitorState:
    state = MonitorState()
    for name, *arguments in reports:
        getattr(state, name)(*arguments)
    return state


@given(stories(), st.data())
def test_restarts_and_calls_that_are_repeated_change_nothing(reports: list[Report], data: st.DataObject) -> None:
    """Killed before a report is in the journal, within its line, or after it: then the caller had no answer."""
    expected = state_after(reports)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        most = data.draw(st.sampled_from([0, 300, 2**20]))
        journal = Journal(str(path), most)
        plain = MonitorState()
        for name, *arguments in reports:
            answer = getattr(plain, name)(*arguments)
            moment = data.draw(st.sampled_from(["lives", "lives", "before", "within", "after"]))
            if moment == "after":
                journal.report(name, *arguments)
            if moment == "within":
                with open(path, "ab") as file:
                    file.write(json.dumps([name, *arguments]).encode()[:-1])
            if moment != "lives":
                journal = Journal(str(path), most)
            assert journal.report(name, *arguments) == answer
        assert json.dumps(journal.state.facts()) == json.dumps(expected.facts())
        assert json.dumps(Journal(str(path)).state.facts()) == json.dumps(expected.facts())


def test_what_is_told_twice_counts_once() -> None:
    once = [("begin", attempt()), ("add", "p", 1, 8, 1, 100), ("loaded", "actor", "p"), ("end", attempt())]
    state = state_after([report for report in once for _ in range(2)])
    assert state.counts == Counts(8, 1, 100, encoders=1)
    assert state_after([("begin_loading", "actor", "n", "p")] * 2).begin_loading("actor", "m", "q") == ["n", "m"]


def test_an_encoder_that_is_started_again_loads_once_more() -> None:
    state = state_after([("loaded", "actor", "p"), ("loaded", "actor", "q"), ("loaded", "actor", "q")])
    assert state.counts.encoders == 2


def test_the_first_reason_stays() -> None:
    assert state_after([("give_up", "disk full"), ("give_up", "no model")]).counts.fatal == "disk full"


def test_an_attempt_is_told_how_many_of_its_pass_and_stage_did_not_end() -> None:
    state = MonitorState()
    assert [state.begin(attempt(process=name)) for name in "pqr"] == [1, 2, 3]
    assert state.begin(attempt(process="x", stage="encode")) == 1 and state.begin(attempt(process="y", shard="t")) == 1
    state.end(attempt(process="q"))
    assert state.begin(attempt(process="z")) == 3
    state.begin_pass()
    assert state.begin(attempt(process="a")) == 1, "each pass has its own tries"
    assert len(state.unfinished(["s"])[0]) == 5, "but the driver judges by all"


def test_a_journal_does_not_grow_with_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(str(path), 2000)
    for number in range(1000):
        one = attempt(number, shard=f"shard {number}")
        journal.report("begin", one)
        journal.report("add", "p", number, 64, 0, 10)
        journal.report("end", one)
        assert path.stat().st_size < 2500
    assert Journal(str(path)).state.counts == Counts(64_000, 0, 10_000)


def test_open_attempts_come_back_as_they_were(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal"), 0)
    journal.report("begin", attempt())
    journal.report("begin_batch", attempt(), ["k"])
    journal.report("report_exit", attempt(), "no device")
    again = Journal(str(tmp_path / "journal"))
    assert again.state.unfinished(["s", "t"]) == [(Unfinished(attempt(), ("k",), "no device"),), ()]


def test_a_disk_that_is_full_is_no_reason_to_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And half a journal is not left, which would be taken for all."""

    def full(file: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    path = tmp_path / "journal"
    journal = Journal(str(path))
    monkeypatch.setattr(monitor_state, "_write_all", full)
    journal.report("give_up", "no model")
    monkeypatch.undo()
    journal.report("give_up", "disk full")
    assert journal.state.counts.fatal == "no model" and not path.exists()
    assert f"is lost if its monitor dies: {path}: [Errno 28] no space" in caplog.text
    missing = Journal(str(tmp_path / "no folder" / "journal"))
    missing.report("give_up", "no model")
    assert missing.state.counts.fatal == "no model"


def test_only_reports_are_replayed(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text('["__init__"]\n')
    with pytest.raises(ValueError, match="no report"):
        Journal(str(tmp_path / "journal"))
