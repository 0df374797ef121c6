"""What becomes of shards whose process died, without Ray: passes are played, everything else is real."""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, WorkerCrashedError

from ray_diffsynth.cache.store import shard_name
from ray_diffsynth.cluster.encoders import EncoderPool
from ray_diffsynth.cluster.nodes import Cluster
from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.preprocess import execute as execute_module
from ray_diffsynth.preprocess.attempts import Attempt, Attempts, Stage
from ray_diffsynth.preprocess.catalog import GroupCatalog
from ray_diffsynth.preprocess.decode_passes import STEP, DecodePass
from ray_diffsynth.preprocess.errors import EncoderError
from ray_diffsynth.preprocess.execute import _side_by_side, encode_group
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.key_columns import Keys, Mask, packed
from ray_diffsynth.preprocess.monitor_state import Counts
from ray_diffsynth.preprocess.ray_errors import PassCallback, Reports, Stopped
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.shards import ShardPlan, Wanted

SIZE = Bucket(64, 64)


def row(number: int) -> Wanted:
    key = hashlib.blake2b(str(number).encode(), digest_size=8).hexdigest()
    return Wanted(key, f"{number}.png", {"image": f"{number}.png"}, SIZE.name, SIZE)


class PlayedRay:
    """A pass as Ray would run it: shards with a deadly row are lost after `retries`, in the stage where it kills.

    In the pass `node_dies_in` all shards are lost with node `b`, on which each was begun; Ray uses up its other tries
    on actors that it starts on the dead machine too, and that begin nothing.
    """

    def __init__(self, deadly: dict[str, Stage], *, says: int | None = None, innocent: Sequence[str] = ()) -> None:
        self.deadly, self.says, self.innocent = deadly, says, list(innocent)
        self.passes: list[list[int]] = []
        self.deaths = 0
        self.attempts = Attempts()
        self.processes = itertools.count()
        self.batch_size = 1 << 30
        self.fatal = ""
        self.nodes = {"a", "b"}
        self.node_dies_in: int | None = None
        self.resources: dict[str, dict[str, float]] = {}
        self.reserved: list[int] = []
        self.for_memory = False
        self.told: list[tuple[int, ...]] = []
        self.monitor = SimpleNamespace(
            get=SimpleNamespace(remote=lambda: Counts(fatal=self.fatal)),
            unfinished=SimpleNamespace(remote=lambda names: [self.attempts.unfinished(name) for name in names]),
        )

    def why_it_died(self, process: str) -> str:
        return "no memory" if self.for_memory else ""

    def dies(self, shard: ShardPlan, stage: Stage, node: str, batch: Sequence[str] = ()) -> None:
        attempt = Attempt(shard.name, stage, node, f"process {next(self.processes)}", 0)
        self.attempts.begin(attempt)
        self.attempts.begin_batch(attempt, batch)

    def run_pass(
        self, line: Any, decoded_together: DecodePass, *, retries: int, in_flight: int
    ) -> tuple[list[dict[str, Any]], int]:
        shards = decoded_together.shards
        self.passes.append([len(shard.rows) for shard in shards])
        self.reserved.append(decoded_together.memory)
        if self.node_dies_in == len(self.passes):
            self.nodes.remove("b")
            for shard in shards:
                self.dies(shard, "encode", "b", shard.keys)
            return [], retries + 1
        results, deaths = [], 0
        for shard in shards:
            stages = [self.deadly[key] for key in shard.keys if key in self.deadly]
            if stages:
                at = next(number for number, key in enumerate(shard.keys) if key in self.deadly)
                at -= at % self.batch_size
                for _ in range(retries + 1):
                    self.dies(shard, stages[0], "a", shard.keys[at : at + self.batch_size])
                deaths += retries + 1
            elif any(key in self.innocent for key in shard.keys):
                self.innocent = [key for key in self.innocent if key not in shard.keys]
            else:
                facts = {"group": "vae", "file": f"{shard.name}.parquet", "bucket": shard.bucket, "nbytes": 1}
                facts |= {"keys": list(shard.keys), "codec": "none", "rows_per_group": len(shard.keys), "failed": {}}
                results.append({"shard": facts, "transient": {}, "warnings": []})
        self.deaths += deaths
        return results, deaths if self.says is None else self.says


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[PlayedRay, int], GroupRun]:
    def call(played: PlayedRay, rows: int | Sequence[Wanted]) -> GroupRun:
        monkeypatch.setattr(execute_module, "run_pass", played.run_pass)
        monkeypatch.setattr(execute_module, "ray", SimpleNamespace(get=lambda value: value))
        monkeypatch.setattr(execute_module, "alive_nodes", lambda: dict.fromkeys(("a", "b")))  # as Ray says: late
        monkeypatch.setattr(execute_module, "living", lambda nodes: set(nodes) & played.nodes)
        wanted = [row(number) for number in range(rows)] if isinstance(rows, int) else rows
        in_buckets = [list(some) for _, some in itertools.groupby(wanted, key=lambda one: one.bucket)]
        planned = [tuple(some[at : at + 64]) for some in in_buckets for at in range(0, len(some), 64)]
        shards = [ShardPlan(shard_name([one.key for one in some]), some[0].bucket, some) for some in planned]
        monkeypatch.setattr(execute_module, "death_by_memory", played.why_it_died)
        monkeypatch.setattr(execute_module, "add_counts", lambda monitor, *counts: played.told.append(counts))
        monkeypatch.setattr(execute_module, "joined_cluster", lambda: Cluster(played.resources))
        run = GroupRun(SimpleNamespace(name="vae"), None, None, shards=shards)  # type: ignore[arg-type]
        size = EncoderPool(1, 1, 1.0, 0.0, 0.5, None, 0.25)
        encode_group(run, SimpleNamespace(monitor=played.monitor, size=size))  # type: ignore[arg-type]
        return run

    return call


def test_only_the_rows_that_kill_are_lost(play: Callable[[PlayedRay, int], GroupRun]) -> None:
    deadly = {row(3).key: "encode", row(70).key: "encode", row(100).key: "decode"}
    played = PlayedRay(deadly)
    run = play(played, 320)
    errors = {key: failure.error for key, failure in run.catalog.failures.items()}
    assert errors == {row(3).key: "EncoderDied", row(70).key: "EncoderDied", row(100).key: "DecoderDied"}
    assert "decoding process" in run.catalog.failures[row(100).key].message
    assert len(run.catalog.locations) == run.encoded == 317
    # Halves, not single rows: seven passes for shards of 64, and only shards that were lost come again.
    assert [max(sizes) for sizes in played.passes] == [64, 32, 16, 8, 4, 2, 1]
    assert len(played.passes[0]) == 5 and all(len(sizes) <= 6 for sizes in played.passes[1:])


def test_the_batch_that_killed_is_cut_out(play: Callable[[PlayedRay, int], GroupRun]) -> None:
    played = PlayedRay({row(3).key: "encode", row(70).key: "encode"})
    played.batch_size = 1
    run = play(played, 128)
    assert set(run.catalog.failures) == {row(3).key, row(70).key} and run.encoded == 126
    assert [sorted(sizes) for sizes in played.passes] == [[64, 64], [1, 1, 63, 63]]


def test_the_search_asks_once_a_pass_what_is_known(
    play: Callable[[PlayedRay, int], GroupRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    knows = GroupCatalog.knows

    def count(self: GroupCatalog, keys: Keys) -> Mask:
        nonlocal asked
        asked += 1
        return knows(self, keys)

    monkeypatch.setattr(GroupCatalog, "knows", count)
    played = PlayedRay({row(3).key: "encode"})
    play(played, 640)
    assert asked == len(played.passes) == 7


def test_large_shards_come_last_and_what_no_machine_can_decode_is_told(
    play: Callable[[PlayedRay, int | Sequence[Wanted]], GroupRun], caplog: pytest.LogCaptureFixture
) -> None:
    """A shard that kills is searched before the large ones are begun, with what its parts need."""
    large, huge = Bucket(640, 640), Bucket(1280, 1280)
    rows = [replace(row(number), decode_bytes=10**6, kept_bytes=10**5) for number in range(2)]
    rows.append(replace(row(2), bucket=large.name, size=large, decode_bytes=7 * 10**8, kept_bytes=10**6))
    rows.append(replace(row(3), bucket=huge.name, size=huge, decode_bytes=2 * 10**9, kept_bytes=10**6))
    played = PlayedRay({row(1).key: "decode"})
    played.resources = {"a": {"CPU": 2.0, "memory": 1e9, "object_store_memory": 1e9}}
    run = play(played, rows)
    assert played.passes == [[2], [1, 1], [1]]
    assert played.reserved == [STEP, STEP, 11 * STEP]
    assert run.encoded == 2 and run.catalog.failures[row(1).key].error == "DecoderDied"
    assert run.catalog.transient.keys() == {row(3).key} and played.told == [(0, 1, 0)]
    assert (
        "1 samples lie in files so large" in caplog.text
        and "takes 2 GB, and the largest machine has 1 GB" in caplog.text
    )


def test_a_shard_that_waited_behind_a_killer_is_not_cut(play: Callable[[PlayedRay, int], GroupRun]) -> None:
    played = PlayedRay({row(3).key: "encode"}, innocent=[row(64).key])
    run = play(played, 128)
    assert sorted(played.passes[1]) == [32, 32, 64] and len(run.catalog.locations) == 127


def test_what_is_lost_with_a_machine_is_not_cut(play: Callable[[PlayedRay, int], GroupRun]) -> None:
    """The same files as in an undisturbed run; only a process that dies while its machine lives makes a row suspect."""
    played = PlayedRay({row(3).key: "encode"})
    played.node_dies_in = 1
    run = play(played, 128)
    assert played.passes[:3] == [[64, 64], [64, 64], [32, 32]] and set(run.catalog.failures) == {row(3).key}


def test_what_is_lost_without_a_death_is_nobodys_fault(play: Callable[[PlayedRay, int], GroupRun]) -> None:
    with pytest.raises(EncoderError, match="lost 1 of 2 shards of vae without a word"):
        play(PlayedRay({}, innocent=[row(3).key]), 128)


def test_a_row_that_runs_out_of_memory_is_quarantined_with_the_reason(
    play: Callable[[PlayedRay, int], GroupRun],
) -> None:
    """Ray tries such a shard again for ever and tells of no death: the attempts that did not end are enough."""
    played = PlayedRay({row(3).key: "decode"}, says=0)
    played.for_memory = True
    run = play(played, 8)
    assert [max(sizes) for sizes in played.passes] == [8, 4, 2, 1] and run.encoded == 7
    assert run.catalog.failures[row(3).key].message.endswith("each time it reached this sample (no memory)")


def test_a_dying_writer_is_no_samples_fault(play: Callable[[PlayedRay, int], GroupRun]) -> None:
    with pytest.raises(EncoderError, match="the process that writes vae died each time"):
        play(PlayedRay({row(0).key: "write"}), 1)


def test_a_reason_given_by_a_task_is_the_error(play: Callable[[PlayedRay, int], GroupRun]) -> None:
    played = PlayedRay({})
    played.fatal = "the disk is full"

    def stopped(*_: Any, **__: Any) -> Any:
        raise Stopped("on request")

    played.run_pass = stopped  # type: ignore[method-assign]
    with pytest.raises(EncoderError, match="the disk is full"):
        play(played, 1)


def test_a_shard_that_was_given_up_ends_the_run_with_the_reason(play: Callable[[PlayedRay, int], GroupRun]) -> None:
    """Ray tells of no death and of no error: the shard has no result, and the monitor knows why."""
    played = PlayedRay({}, innocent=[row(0).key])
    played.fatal = "disk full"
    with pytest.raises(EncoderError, match="disk full"):
        play(played, 1)
    assert played.passes == [[1]]


def own_reports() -> Reports:
    """Of a pass whose execution runs in this thread."""
    reports = Reports(threading.Event())
    reports.threads.add(threading.current_thread().name)
    return reports


def test_only_deaths_are_deaths() -> None:
    logger = logging.getLogger("ray.data._internal.execution.streaming_executor_state")
    with own_reports() as reports:
        logger.error("lost", exc_info=ActorDiedError())
        logger.error("lost", exc_info=WorkerCrashedError())
    assert reports.deaths("vae") == 2
    with own_reports() as reports:
        logger.error("lost", exc_info=RayTaskError("map", "Traceback", ValueError("no room")))
    with pytest.raises(EncoderError, match="vae could not be encoded.*no room"):
        reports.deaths("vae")
    assert not [handler for handler in logger.handlers if isinstance(handler, Reports)]


class Executor(threading.Thread):
    """An execution of Ray Data as far as a pass sees it: a thread of its own that logs errors and asks its callback."""

    def __init__(self, name: str, errors: Sequence[Exception] = ()) -> None:
        super().__init__(name=name)
        self.errors, self.callback = errors, PassCallback()
        self.stopped = False

    def run(self) -> None:
        for error in self.errors:
            logging.getLogger("ray.data._internal.execution.streaming_executor_state").error("lost", exc_info=error)
        try:
            self.callback.on_execution_step(self)
        except Stopped:
            self.stopped = True

    def execute(self) -> None:
        self.callback.before_execution_starts(self)
        self.start()
        self.join()


def test_each_pass_hears_of_its_own_errors_and_its_own_stop() -> None:
    """Two groups side by side, and another run in the same process: each in a thread, all passes under way at once."""
    under_way = threading.Barrier(3)
    passes: dict[str, Reports] = {}
    executors = {
        "vae": Executor("StreamingExecutor-1", [ActorDiedError(), WorkerCrashedError()]),
        "text_encoder": Executor("StreamingExecutor-2", [RayTaskError("map", "Traceback", ValueError("no room"))]),
        "another run": Executor("StreamingExecutor-3"),
    }
    stops = {"vae": (stop := threading.Event()), "text_encoder": stop, "another run": threading.Event()}
    stop.set()

    def one(group: str) -> None:
        with Reports(stops[group]) as reports:
            passes[group] = reports
            under_way.wait(300)
            executors[group].execute()
            under_way.wait(300)

    threads = [threading.Thread(target=one, args=(group,)) for group in executors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passes["vae"].deaths("vae") == 2 and passes["another run"].deaths("another run") == 0
    with pytest.raises(EncoderError, match="text_encoder could not be encoded.*no room"):
        passes["text_encoder"].deaths("text_encoder")
    stopped = [group for group, executor in executors.items() if executor.stopped]
    assert stopped == ["vae", "text_encoder"]
    with Reports(stop) as after:  # an execution that no pass began is nobody's
        pass
    executors = {"other": Executor("StreamingExecutor-4", [ActorDiedError()])}
    executors["other"].execute()
    assert after.errors == [] and not executors["other"].stopped


def named(group: str) -> GroupRun:
    return GroupRun(SimpleNamespace(name=group), None, None)  # type: ignore[arg-type]


def test_the_other_groups_are_stopped_and_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    stop = threading.Event()

    def group(run: GroupRun, line: Any) -> None:
        if run.name == "bad":
            raise EncoderError("no such model")
        assert stop.wait(300)
        ended.append(run.name)
        raise Stopped("on request")

    monkeypatch.setattr(execute_module, "encode_group", group)
    with pytest.raises(EncoderError, match="no such model"):
        _side_by_side([named("good"), named("bad")], ["", ""], stop)  # type: ignore[list-item]
    assert ended == ["good"] and threading.active_count() >= 1


def test_each_group_names_its_own_error_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Two groups fail by themselves, one is stopped: the first error is raised, the second told, the third neither."""
    errors = {
        "vae": RuntimeError("the cluster is gone"),
        "text_encoder": EncoderError("text_encoder cannot be written to /cache: disk full"),
        "dit": Stopped("on request"),
    }
    stop = threading.Event()

    def group(run: GroupRun, line: Any) -> None:
        if run.name != "vae":
            assert stop.wait(300)  # until the first error is taken in
        raise errors[run.name]

    monkeypatch.setattr(execute_module, "encode_group", group)
    runs = [named(name) for name in errors]
    with pytest.raises(RuntimeError, match="the cluster is gone") as caught:
        _side_by_side(runs, ["", "", ""], stop)  # type: ignore[list-item]
    assert caught.value.__notes__ == ["while the group vae was encoded"]
    assert [record.getMessage() for record in caplog.records] == ["text_encoder cannot be written to /cache: disk full"]


def test_transient_failures_are_kept_apart() -> None:
    run = GroupRun(None, None, None)  # type: ignore[arg-type]
    catalog = run.catalog
    run.add_results([{"shard": None, "transient": {"k": ["SourceChanged", "changed"]}, "warnings": []}])
    assert not catalog.knows(packed(["k"])).any() and catalog.failure("k") == Failure("SourceChanged", "changed")
