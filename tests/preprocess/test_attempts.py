"""Who worked on which shard: what is told late, twice or in another order changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ray_diffsynth.preprocess.attempts import Attempt, Attempts, Stage, Unfinished, on_living_nodes


def attempt(
    number: int = 0, *, process: str = "p", node: str = "a", shard: str = "s", stage: Stage = "encode"
) -> Attempt:
    return Attempt(shard, stage, node, process, number)


def told(*reports: tuple[Any, ...]) -> Attempts:
    """Attempts after these reports: (method, attempt, …)."""
    attempts = Attempts()
    for method, *arguments in reports:
        getattr(attempts, method)(*arguments)
    return attempts


def open_at(attempts: Attempts, shard: str = "s") -> list[Attempt]:
    return [item.attempt for item in attempts.unfinished(shard)]


def test_what_ended_is_not_held_against_its_shard() -> None:
    one, other = attempt(process="p"), attempt(process="q")
    attempts = told(("begin", one), ("begin", other), ("end", one))
    assert open_at(attempts) == [other] and open_at(attempts, "another") == []


def test_the_batch_and_the_last_words_belong_to_their_attempt() -> None:
    one, other = attempt(process="p"), attempt(process="q", node="b")
    attempts = told(
        ("begin", one),
        ("begin_batch", one, ["k1", "k2"]),
        ("report_exit", one, "no device"),
        ("begin", other),
        ("begin_batch", other, ["k0"]),
        ("begin_batch", one, ["k3"]),
    )
    assert attempts.unfinished("s") == (Unfinished(one, ("k3",), "no device"), Unfinished(other, ("k0",)))


def test_a_process_that_goes_on_has_not_died_at_what_it_did_before() -> None:
    """Its end was never told, or is told after it has begun the next."""
    first, second = attempt(0), attempt(1, shard="t")
    attempts = told(("begin", first), ("begin", second))
    assert open_at(attempts, "s") == [] and open_at(attempts, "t") == [second]
    attempts.end(first)
    assert open_at(attempts, "t") == [second]


def test_what_is_told_again_of_an_attempt_that_is_over_is_ignored() -> None:
    first, second = attempt(0), attempt(1)
    attempts = told(("begin", first), ("end", first), ("begin", first), ("begin_batch", first, ["k"]))
    assert open_at(attempts) == []
    attempts = told(("end", first), ("begin", first), ("report_exit", first, "late"))
    assert open_at(attempts) == []
    attempts = told(("begin", first), ("begin", second), ("begin", first))
    assert open_at(attempts) == [second]


def test_the_same_attempt_told_twice_is_one() -> None:
    one = attempt()
    assert told(("begin", one), ("begin", one), ("begin_batch", one, ["k"]), ("begin", one)).unfinished("s") == (
        Unfinished(one, ("k",)),
    )


def test_what_died_with_its_machine_is_told_apart() -> None:
    attempts = [Unfinished(attempt(process="p", node="a")), Unfinished(attempt(process="q", node="b"))]
    assert on_living_nodes(attempts, {"a"}) == attempts[:1]
    assert on_living_nodes(attempts, set()) == [] and on_living_nodes(attempts, {"a", "b", "c"}) == attempts


@st.composite
def stories(draw: st.DrawFn) -> list[list[tuple[Any, ...]]]:
    """What some processes tell, each in its own order: attempts that end, and at most a last one that does not."""
    processes = []
    for process in range(draw(st.integers(1, 4))):
        reports: list[tuple[Any, ...]] = []
        count = draw(st.integers(1, 4))
        for number in range(count):
            mine = attempt(
                number,
                process=f"p{process}",
                node=draw(st.sampled_from("ab")),
                shard=draw(st.sampled_from("st")),
                stage=draw(st.sampled_from(["decode", "encode", "write"])),
            )
            reports += [("begin", mine), ("begin_batch", mine, [f"k{process}{number}"])]
            if number < count - 1 or draw(st.booleans()):
                reports.append(("end", mine))
        processes.append(reports)
    return processes


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[list[tuple[Any, ...]]], list[tuple[Any, ...]]]:
    """A story, and its reports as they may come in: those of a process in order, some twice, the processes mixed."""
    processes = draw(stories())
    waiting = [[report for report in reports for _ in range(draw(st.integers(1, 2)))] for reports in processes]
    mixed = []
    while any(waiting):
        source = draw(st.sampled_from([reports for reports in waiting if reports]))
        mixed.append(source.pop(0))
    return processes, mixed


def known(attempts: Attempts) -> set[Unfinished]:
    return {item for shard in "st" for item in attempts.unfinished(shard)}


@given(deliveries())
def test_the_order_in_which_processes_are_heard_changes_nothing(
    delivery: tuple[list[list[tuple[Any, ...]]], Sequence[tuple[Any, ...]]],
) -> None:
    processes, mixed = delivery
    last = {reports[-1][1]: reports for reports in processes}
    expected = {
        Unfinished(end, tuple(reports[-1][2])) for end, reports in last.items() if reports[-1][0] == "begin_batch"
    }
    assert known(told(*mixed)) == expected == known(told(*(report for reports in processes for report in reports)))
