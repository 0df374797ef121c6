"""How a run gets its workers and what it does when they are lost, without Ray: its answers are given here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from torch import nn

from ray_diffsynth.cluster import session, wait
from ray_diffsynth.cluster.address import ClusterError
from ray_diffsynth.cluster.demand import Ask, Demand
from ray_diffsynth.cluster.environment import Parcel
from ray_diffsynth.cluster.nodes import Cluster as Machines
from ray_diffsynth.cluster.nodes import Process
from ray_diffsynth.cluster.workers import WorkerGroup
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.ray_compat import Autoscaler
from ray_diffsynth.training import distributed, shard
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.ray import elastic, job, worker
from ray_diffsynth.training.ray import fit as one_group
from ray_diffsynth.training.ray.elastic import Watch, ask_for_more, wait_for_room
from ray_diffsynth.training.ray.sampler_actor import SamplerActor
from ray_diffsynth.training.result import TrainResult
from tests.training.helpers import unresolved

GPUS = {"a": {"CPU": 2.0, "GPU": 1.0}, "b": {"CPU": 2.0, "GPU": 1.0}}
TWO = Machines(GPUS)
ONE_HELD = Machines({**GPUS, "b": {"CPU": 2.0}})
NONE_FREE = Machines({"a": {}, "b": {}})
ONE = Machines({"a": GPUS["a"]})


class Looks:
    """Looks at the cluster, in order, the last of which stays: what is there, and what is free of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks: list[tuple[Machines, Machines]] = []
        self.scaling: Autoscaler | None = None
        self.asked: list[Demand] = []
        self.requester = SimpleNamespace(ask=self.asked.append, cancel=lambda: self.asked.append(Demand()))
        self.now = 0.0  # seconds pass only while it sleeps
        self._current: tuple[Machines, Machines] = (TWO, TWO)
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(elastic, "joined_cluster", self.look)
        monkeypatch.setattr(elastic, "answering", lambda found: found)
        monkeypatch.setattr(elastic, "unused", lambda found: self._current[1])
        monkeypatch.setattr(elastic, "autoscaler", lambda: self.scaling)
        monkeypatch.setattr(elastic, "time", clock)
        monkeypatch.setattr(wait, "time", clock)

    def look(self) -> Machines:
        if self.looks:
            self._current = self.looks.pop(0)
        return self._current[0]

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, group: WorkerGroup, minutes: float = 30.0, **options: Any) -> int:
        return wait_for_room(
            group,
            self.requester,  # type: ignore[arg-type]
            options.pop("stopped", lambda: False),
            minutes=minutes,
            **options,
        )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


def test_a_fixed_group_waits_for_what_is_free_and_says_what_is_missing(
    cluster: Looks, caplog: pytest.LogCaptureFixture
) -> None:
    group = WorkerGroup(2, 2, {"CPU": 1.0, "GPU": 1.0}, virtual_ranks=2)
    cluster.looks += [*[(ONE, ONE)] * 40, (TWO, TWO)]
    assert cluster.wait(group) == 2 and not cluster.looks
    logged = (
        "waiting for machines for 5 s (at most 30 min): 2 training workers of 1 GPU, 1 CPU: 1 would fit; free are "
        "2 of 2 CPU, 1 of 1 GPU on 1 machines"
    )
    assert caplog.text.count("waiting for machines") == 1 and logged in caplog.text
    assert not cluster.asked  # without an autoscaler
    cluster.looks += [(TWO, ONE_HELD)]  # there, but another job has it
    with pytest.raises(
        ClusterError, match="no room for 2 training workers .* 1 would fit; free are 4 of 4 CPU, 1 of 2 GPU on 2"
    ):
        cluster.wait(group, minutes=2)
    assert "others have the machines for 5 s (at most 2 min)" in caplog.text
    cluster.looks += [(TWO, ONE_HELD)]
    stop = iter([False, False, True])
    assert cluster.wait(group, stopped=lambda: next(stop)) == 0


def test_an_elastic_group_waits_a_moment_for_what_is_still_held(cluster: Looks) -> None:
    group = WorkerGroup(1, 8, {"GPU": 1.0}, virtual_ranks=8)
    cluster.looks += [(TWO, NONE_FREE), (TWO, ONE_HELD), (TWO, TWO)]
    assert cluster.wait(group) == 2
    cluster.looks += [(TWO, ONE_HELD)]  # and if somebody else holds it, it takes what there is
    assert cluster.wait(group) == 1


def test_a_group_grows_by_what_is_free_alone(cluster: Looks) -> None:
    watch = Watch(None, WorkerGroup(1, 8, {"GPU": 1.0}, virtual_ranks=8), 1, threading.Event())
    for free, possible in ((NONE_FREE, 1), (ONE_HELD, 2)):
        cluster.looks += [(TWO, free)]
        assert watch._possible(elastic.joined_cluster()) == possible


def test_a_cluster_at_zero_is_asked_for_all_and_training_starts_with_the_least(
    cluster: Looks, caplog: pytest.LogCaptureFixture
) -> None:
    group = WorkerGroup(1, 8, {"CPU": 1.0, "GPU": 1.0}, virtual_ranks=8, selector={"stage": "train"})
    drawing = Ask("actors that make sample images", Process({"GPU": 1.0}, {"stage": "draw"}), 1, 1)
    head, encode = {"head": {"CPU": 0.0}}, {"e": GPUS["a"]}
    labels = {"e": {"stage": "encode"}, "a": {"stage": "train"}, "d": {"stage": "draw"}}
    nothing = Machines({**head, **encode}, labels=labels)
    worker = Machines({**head, **encode, "a": GPUS["a"]}, labels=labels)
    both = Machines({**worker.nodes, "d": GPUS["a"]}, labels=labels)
    cluster.scaling = Autoscaler(("train",))
    cluster.looks += [*[(nothing, nothing)] * 20, *[(worker, worker)] * 20, (both, both)]
    assert cluster.wait(group, beside=[drawing]) == 1 and not cluster.looks
    assert all(asked == group.demand([drawing]) for asked in cluster.asked) and len(cluster.asked[0].bundles()) == 9
    said = [record.message.partition("): ")[2] for record in caplog.records]
    assert said == [
        "1 to 8 training workers of 1 GPU, 1 CPU with stage=train: 0 would fit; there is no such machine; "
        "1 actors that make sample images of 1 GPU with stage=draw: 0 would fit; there is no such machine; "
        "starting: train",
        "1 actors that make sample images of 1 GPU with stage=draw: 0 would fit; there is no such machine; "
        "starting: train",
    ]
    cluster.asked.clear()
    ask_for_more(group, cluster.requester, 3, [drawing])  # type: ignore[arg-type]
    assert cluster.asked.pop() == group.demand([drawing], training=3)
    ask_for_more(group, cluster.requester, 8, [drawing])  # type: ignore[arg-type]
    assert cluster.asked.pop() == Demand()


def test_machines_that_come_together_are_taken_together(cluster: Looks) -> None:
    watch = Watch(None, WorkerGroup(1, 2, {"GPU": 1.0}, virtual_ranks=2), 1, threading.Event())
    watch._group = WorkerGroup(1, 8, {"GPU": 1.0}, virtual_ranks=8)
    cluster.looks += [(TWO, ONE)]
    cluster.scaling = Autoscaler(("train",))
    assert not watch._should_grow(10.0)
    assert watch._should_grow(elastic.GROW_SECONDS)  # but not for ever
    cluster.scaling = Autoscaler()
    assert watch._should_grow(10.0)
    watch._group = WorkerGroup(1, 2, {"GPU": 1.0}, virtual_ranks=2)
    cluster.scaling = Autoscaler(("train",))
    assert watch._should_grow(10.0)  # it needs no more


@pytest.mark.parametrize(("leaving", "regroup"), [("x", None), ("b", "a node is being taken away")])
def test_only_a_node_that_trains_makes_a_run_regroup(
    cluster: Looks, monkeypatch: pytest.MonkeyPatch, leaving: str, regroup: str | None
) -> None:
    """An autoscaler takes idle machines away, those of another stage too: that is no reason to start again."""
    looked, stops = threading.Event(), list[str]()

    def draining() -> set[str]:
        looked.set()
        return {leaving}

    collector = SimpleNamespace(
        nodes=SimpleNamespace(remote=lambda workers: ["a", "b"] if workers == 2 else []),
        request_stop=SimpleNamespace(remote=lambda: stops.append("stop")),
    )
    monkeypatch.setattr(elastic, "draining_nodes", draining)
    monkeypatch.setattr(elastic, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(elastic.ray, "get", lambda value: value)
    with Watch(collector, WorkerGroup(2, 2, {"GPU": 1.0}, virtual_ranks=2), 2, threading.Event()) as watch:
        assert looked.wait(60)
    assert watch.regroup == regroup and stops == ([] if regroup is None else ["stop"])


class Cluster:
    """Stands for Ray in `_fit_until_done`: each group of workers ends as the script says, and what is made is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: list[str]) -> None:
        self.script, self.fits = script, 0
        self.arguments: dict[str, Any] = {}
        self.steps = 0
        handle = SimpleNamespace(
            begin=SimpleNamespace(remote=lambda: None),
            result=SimpleNamespace(remote=lambda: self.result()),
            warnings=SimpleNamespace(remote=list),
        )
        collector = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: handle))
        monkeypatch.setattr(job, "Collector", collector)
        monkeypatch.setattr(job, "on_this_node", lambda: None)
        monkeypatch.setattr(job, "wait_for_room", lambda *_, **options: 1)
        monkeypatch.setattr(job, "ask_for_more", lambda *_: None)
        monkeypatch.setattr(job, "no_placement_group_stays", nullcontext)
        monkeypatch.setattr(job, "fit", self.fit)
        monkeypatch.setattr(job, "list_checkpoints", lambda path: ["step-1"][: self.steps])
        monkeypatch.setattr(job.ray, "get", lambda value: value)
        monkeypatch.setattr(job.ray, "kill", lambda actor: None)

        @contextmanager
        def watched(*_: object) -> Iterator[Any]:
            yield SimpleNamespace(
                regroup="there is room for more workers",
                lost_to_notice=lambda: self.script[self.fits - 1] == "taken",
            )

        @contextmanager
        def progress_bar(collector: object) -> Iterator[None]:
            yield

        monkeypatch.setattr(job, "Watch", watched)
        monkeypatch.setattr(job, "_progress_bar", progress_bar)

    def fit(self, worker: object, arguments: dict[str, Any], group: WorkerGroup, workers: int, *_: object) -> None:
        self.arguments, self.fits = arguments, self.fits + 1
        if self.script[self.fits - 1] in ("lost", "taken"):
            raise ray.train.TrainingFailedError("a worker died")

    def result(self) -> dict[str, Any]:
        done = 9 if self.script[self.fits - 1] == "end" else 5
        return TrainResult(done, 9, 0, 3, 10, 0, 0.1, 1.0).to_dict()


def fit(config: TrainConfig) -> tuple[TrainResult, int]:
    wanted: Any = None
    return job._fit_until_done(unresolved(config), WorkerGroup(1, 2, {"CPU": 1.0}, 2), [], wanted, threading.Event())


def test_failures_are_counted_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    config = TrainConfig(model="m", dataset_base_path="c")
    ray_stands = Cluster(monkeypatch, ["lost", "lost", "regroup", "lost", "lost", "end"])
    assert fit(config)[0].finished and ray_stands.fits == 6
    assert "secret" not in str(ray_stands.arguments)  # which Ray Train may show
    ray_stands = Cluster(monkeypatch, [*["lost", "taken"] * 2, *["taken"] * 3, "end"])  # spot machines come and go
    assert fit(config)[0].finished and ray_stands.fits == 8
    ray_stands = Cluster(monkeypatch, ["regroup", "lost", "lost", "lost", "end"])
    with pytest.raises(ray.train.TrainingFailedError):
        fit(config)
    assert ray_stands.fits == 4


@pytest.mark.parametrize(("gpu", "backend"), [(0.0, "gloo"), (0.5, "gloo"), (1.0, "nccl")])
def test_each_failure_comes_back_from_ray(monkeypatch: pytest.MonkeyPatch, gpu: float, backend: str) -> None:
    """Also workers that cannot be placed, which Ray Train would try again for ever; and NCCL is for whole GPUs."""
    made: list[dict[str, Any]] = []

    class Trainer:
        def __init__(self, *_: Any, **options: Any) -> None:
            made.append(options)

        def fit(self) -> None:
            pass

    monkeypatch.setattr(one_group, "_Trainer", Trainer)
    config = TrainConfig(model="m", dataset_base_path="c")
    group = WorkerGroup(2, 2, {"CPU": 1.0, "GPU": gpu} if gpu else {"CPU": 1.0}, 2)
    one_group.fit(job._worker, {"plan": unresolved(config)}, group, 2)
    limits = made[0]["run_config"].failure_config
    assert (limits.max_failures, limits.controller_failure_limit, limits.max_preemption_failures) == (0, 0, 0)
    assert limits.preemption_grace_s == one_group.GRACE_SECONDS
    assert made[0]["torch_config"].backend == backend


@pytest.mark.parametrize("ids", [[], ["2"]])
def test_a_worker_without_a_gpu_of_its_own_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch, ids: list[str]) -> None:
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: ids)
    assert worker.RayRuntime(None).device.type == ("cuda" if ids else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    assert session.own_device() == ("cuda" if ids else "cpu")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert session.own_device() == "cuda"


def test_ddp_takes_the_device_that_the_module_lies_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Parallel:
        @staticmethod
        def _set_params_and_buffers_to_ignore_for_model(module: nn.Module, names: list[str]) -> None:
            made.append({"ignored": names})

        def __init__(self, module: nn.Module, **options: Any) -> None:
            made.append(options)

    monkeypatch.setattr(distributed, "DistributedDataParallel", Parallel)
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    distributed.wrap_ddp(module, 2)
    assert made[0] == {"ignored": ["1.weight", "1.bias"]} and made[1].get("device_ids") is None
    assert distributed.wrap_ddp(module, 1) is module


def test_the_messages_of_rank_0_go_to_the_driver() -> None:
    logged: list[tuple[str, int]] = []
    collector = SimpleNamespace(log=SimpleNamespace(remote=lambda *message: logged.append(message)))
    log = logging.getLogger("ray_diffsynth.training.trainer")
    before = logging.getLogger("ray_diffsynth").level
    for rank in (0, 1):
        with worker.messages_to_driver(SimpleNamespace(collector=collector, world_rank=rank)):  # type: ignore[arg-type]
            log.info("going on from step %d", 4)
            log.warning("damaged")
            log.debug("nothing")
    log.warning("after")
    assert logged == [("going on from step 4", logging.INFO), ("damaged", logging.WARNING)]
    assert logging.getLogger("ray_diffsynth").level == before


def test_metrics_are_sent_no_oftener_than_the_driver_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    now, sent = [100.0], list[int]()
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    collector = SimpleNamespace(add=SimpleNamespace(remote=lambda metrics: sent.append(metrics["step"])))
    train_context = worker.RayRuntime(collector)
    for step in range(1, 8):
        train_context.report({"step": step})
        now[0] += 0.2
    assert sent == [1, 4, 7]
    train_context.report({"step": 8})
    for _ in range(2):
        train_context.send_metrics()  # at the end
    assert sent == [1, 4, 7, 8]


def test_a_sampler_says_at_once_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    collector = SimpleNamespace(log=SimpleNamespace(remote=logged.append))
    monkeypatch.setattr(worker.ray, "get", lambda value: value)
    monkeypatch.setattr(worker.ray, "get_gpu_ids", list)
    what = Parcel(None, (unresolved(TrainConfig(model="/nowhere", dataset_base_path="c")), ["a cat"]))
    actor = SamplerActor.__ray_metadata__.modified_class(what, False, collector)  # type: ignore[attr-defined]
    actor.draw(4, {})
    actor.draw(8, {})
    assert len(logged) == 1 and logged[0].startswith("the sample images ended early: step 4: ")
    assert "/nowhere" in logged[0] and actor.finish() == []


def test_workers_that_would_wait_for_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """--shard_base with rows of differing num_inference_steps; the other worker has a batch of four."""

    def same(number: int, world_size: int, device: torch.device) -> bool:
        return number == 4

    monkeypatch.setattr(shard, "all_equal", same)
    cpu = torch.device("cpu")
    shard.check_equal_work([{"num_inference_steps": 4}, {"num_inference_steps": 4}], 2, cpu)
    shard.check_equal_work([{"input_latents": torch.zeros(1)}], 2, cpu)
    shard.check_equal_work([{"num_inference_steps": 1}, {"num_inference_steps": 3}], 2, cpu)  # as often as four
    for steps in ([8], [4, 1]):
        with pytest.raises(TrainingError, match="--shard_base needs the same num_inference_steps"):
            shard.check_equal_work([{"num_inference_steps": number} for number in steps], 2, cpu)
