"""Whom a loss counts against: a shard whose process died again and again while its machine lived, and no other."""

from __future__ import annotations

import pytest

from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.preprocess.attempts import Attempt, Stage, Unfinished
from ray_diffsynth.preprocess.errors import EncoderError
from ray_diffsynth.preprocess.losses import NODES, RETRIES, Losses
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.shards import ShardPlan, Wanted

SIZE = Bucket(64, 64)


def shard(rows: int) -> ShardPlan:
    members = tuple(Wanted(f"k{n}", f"{n}.png", {"image": f"{n}.png"}, SIZE.name, SIZE) for n in range(rows))
    return ShardPlan("s", SIZE.name, members)


def died(*nodes: str, stage: Stage = "encode", batch: tuple[str, ...] = (), words: str = "") -> list[Unfinished]:
    """One attempt on each of the nodes, each by a process of its own, in this order."""
    return [Unfinished(Attempt("s", stage, node, f"p{n}", 0), batch, words) for n, node in enumerate(nodes)]


WHOLE, PARTS = "whole", "parts"
SCENARIOS = {
    # name: (nodes of the unfinished attempts, nodes that live, retries of the pass, what is tried next)
    "it never began: it waited behind another": ("", "a", 2, WHOLE),
    "its machine died, Ray used up the other tries by itself": ("b", "a", 2, WHOLE),
    "its machine died, on which it was begun three times": ("bbb", "a", 2, WHOLE),
    "two machines died one after the other": ("bc", "a", 2, WHOLE),
    "its machine died in the second pass, the first one's too": ("bc", "a", 1, WHOLE),
    "an actor died by itself once, then its machine": ("ab", "a", 2, WHOLE),
    "its machine died, then two actors by themselves": ("baa", "a", 2, WHOLE),
    "a process died by itself each time": ("aaa", "a", 2, PARTS),
    "the same on machines that all live": ("abc", "abc", 2, PARTS),
    "the same, and a machine died too": ("abaa", "a", 2, PARTS),
    "the same, told in another order": ("aaab", "a", 2, PARTS),
    "twice, where a pass tries twice": ("aa", "ab", 1, PARTS),
    "once, where a pass tries twice": ("a", "ab", 1, WHOLE),
    "twice, of which one was a pass before": ("aba", "a", 1, PARTS),
    "no machine answers": ("aaa", "", 2, WHOLE),
}


@pytest.mark.parametrize(("nodes", "living", "retries", "expected"), SCENARIOS.values(), ids=SCENARIOS.keys())
def test_what_is_tried_next(nodes: str, living: str, retries: int, expected: str) -> None:
    lost = shard(4)
    again = Losses("vae").next_attempt(
        lost, died(*nodes), set(living), retries=retries, node_lost=not set(nodes) <= set(living)
    )
    assert isinstance(again, list)
    if expected == WHOLE:
        assert again == [lost]
    else:
        assert [part.keys for part in again] == [("k0", "k1"), ("k2", "k3")]


def test_the_batch_of_the_last_process_that_died_by_itself_is_cut_out() -> None:
    attempts = [*died("a", "a", batch=("k0",)), *died("a", batch=("k2",)), *died("b", batch=("k1",))]
    again = Losses("vae").next_attempt(shard(4), attempts, {"a"}, retries=2, node_lost=True)
    assert isinstance(again, list)
    assert [part.keys for part in again] == [("k2",), ("k0", "k1", "k3")]


@pytest.mark.parametrize(
    ("stage", "words", "expected"),
    [
        ("decode", "", Failure("DecoderDied", "the decoding process died each time it reached this sample")),
        ("encode", "x", Failure("EncoderDied", "the encoding process died each time it reached this sample (x)")),
    ],
)
def test_a_row_that_stands_alone_is_the_failure(stage: Stage, words: str, expected: Failure) -> None:
    attempts = died("a", "a", stage=stage, words=words)
    assert Losses("vae").next_attempt(shard(1), attempts, {"a"}, retries=1, node_lost=False) == expected
    # Not when its machine died: then it is tried again.
    assert Losses("vae").next_attempt(shard(1), attempts, {"b"}, retries=1, node_lost=True) == [shard(1)]


def test_a_writer_that_dies_is_no_samples_fault() -> None:
    with pytest.raises(EncoderError, match="the process that writes vae died each time"):
        Losses("vae").next_attempt(shard(1), died("a", "a", stage="write"), {"a"}, retries=1, node_lost=False)


def test_a_shard_that_is_lost_without_a_reason_ends_the_run_in_the_end() -> None:
    losses = Losses("vae")
    for _ in range(RETRIES):
        assert losses.next_attempt(shard(4), [], {"a"}, retries=1, node_lost=False) == [shard(4)]
    # A pass in which a machine was lost says nothing, however often.
    for _ in range(10):
        assert losses.next_attempt(shard(4), [], {"a"}, retries=1, node_lost=True) == [shard(4)]
    with pytest.raises(EncoderError, match="Ray lost a shard of vae 3 times"):
        losses.next_attempt(shard(4), [], {"a"}, retries=1, node_lost=False)


def test_rows_that_take_machine_after_machine_with_them_end_the_run() -> None:
    """They are not cut, since nothing says which row it is, and not tried for ever: each try may cost a machine."""
    nodes = [f"n{number}" for number in range(NODES)]
    assert Losses("vae").next_attempt(shard(4), died(*nodes[1:]), {"a"}, retries=1, node_lost=True) == [shard(4)]
    with pytest.raises(EncoderError, match=rf"{NODES} machines went down .* 4 rows of vae \(the first: 0.png, 1.png"):
        Losses("vae").next_attempt(shard(4), died(*nodes), {"a"}, retries=1, node_lost=True)
