"""How pools share a cluster: pure, on clusters that are not there."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from ray_diffsynth.cluster.demand import Ask, Demand, Shortage
from ray_diffsynth.cluster.encoders import (
    EncoderPool,
    batch_size,
    check_pools,
    encoder_demand,
    encoder_pools,
    scan_demand,
)
from ray_diffsynth.cluster.generators import GeneratorPool, generator_pool
from ray_diffsynth.cluster.nodes import Cluster, Process, pack, room
from ray_diffsynth.cluster.session import ClusterError
from ray_diffsynth.cluster.workers import WorkerGroup, check_sampler, sampler_process, worker_group
from ray_diffsynth.config import GenerateConfig, PreprocessConfig, TrainConfig
from ray_diffsynth.errors import ConfigError

GROUPS = ("vae", "text_encoder")


def machines(cpus: float, gpus: float, count: int = 1) -> Cluster:
    """Equal ones, with so many CPUs and GPUs in all, and a resource of the user's own."""
    node = {"CPU": cpus / count, "GPU": gpus / count, "big": 2.0}
    return Cluster({f"node{number}": node for number in range(count)})


def sizes(cpus: float, gpus: float, nodes: int = 1, **options: Any) -> dict[str, EncoderPool]:
    config = PreprocessConfig(model="m", dataset_base_path="d", **options)
    return encoder_pools(config, GROUPS, machines(cpus, gpus, nodes))


def reserved(found: dict[str, EncoderPool]) -> tuple[float, float]:
    """CPUs and GPUs of the smallest pools, with one decode and one write task each."""
    cpus = sum(size.min_actors * size.actor_cpus + size.decode_cpus + size.write_cpus for size in found.values())
    return cpus, sum(size.min_actors * size.actor_gpus for size in found.values())


def test_one_group_after_another_takes_all() -> None:
    vae = sizes(16, 4)["vae"]
    assert (vae.min_actors, vae.max_actors, vae.actor_gpus) == (4, 4, 1.0)
    assert sizes(2, 0)["vae"].min_actors == 1


def test_when_half_of_the_machines_are_lost_decoding_still_has_room() -> None:
    for nodes in (2, 4):
        size = sizes(2 * nodes, 0, nodes=nodes)["vae"]
        assert size.min_actors * size.actor_cpus + size.decode_cpus + size.write_cpus <= 2 * nodes / 2


@pytest.mark.parametrize(("cpus", "gpus"), [(2, 0), (4, 1), (16, 2), (64, 8)])
def test_default_pools_fit_side_by_side(cpus: float, gpus: float) -> None:
    found = sizes(cpus, gpus, pools={})
    needed = reserved(found)
    assert needed[0] <= cpus and needed[1] <= gpus
    assert found["vae"].actor_gpus == {0: 0, 1: 0.5}.get(int(gpus), 1.0)


def test_each_pool_has_its_own_share_and_batch() -> None:
    pools = {"vae": {"num_gpus": 0.25, "batch_size": 4}, "text_encoder": {"num_gpus": 0.75, "max_size": 3}}
    found = sizes(16, 3, pools=pools, batch_size=2)
    assert (found["vae"].actor_gpus, found["vae"].max_actors) == (0.25, 1)
    text = found["text_encoder"]
    assert (text.actor_gpus, text.min_actors, text.max_actors) == (0.75, 1, 3)
    config = PreprocessConfig(model="m", dataset_base_path="d", pools=pools, batch_size=2)
    assert (batch_size(config, "vae"), batch_size(config, "text_encoder")) == (4, 2)


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ({"vae": {"num_gpus": 0.6}, "text_encoder": {"num_gpus": 0.6}}, "need 1.2 GPU.*the cluster has 1"),
        ({"vae": {"num_cpus": 3}, "text_encoder": {"num_cpus": 1}}, "need 4 CPU.*decoding and writing"),
    ],
)
def test_pools_that_do_not_fit_say_so(pools: Any, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        sizes(4, 1, pools=pools)


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ({"vae": {"gpus": 1}}, "gpus is not known.*num_gpus"),
        ({"vae": {"batch_size": 0}}, "batch_size=0 is not a whole number"),
        ({"vae": {"min_size": 3, "max_size": 2}}, "min_size=3 is above max_size=2"),
    ],
)
def test_pools_that_make_no_sense(pools: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreprocessConfig(model="m", dataset_base_path="d", pools=pools)


ONE_GPU = {"CPU": 8.0, "GPU": 1.0}
MIXED = Cluster(
    {"e1": ONE_GPU, "e2": ONE_GPU, "t": {"CPU": 64.0, "GPU": 8.0}, "head": {"CPU": 4.0}},
    labels={"e1": {"stage": "encode"}, "e2": {"stage": "encode"}, "t": {"stage": "train"}},
)


def test_parts_of_a_gpu_are_of_one_device() -> None:
    """Three shares of 0.6 are less than two GPUs, and a tenth is in a GPU ten times."""
    for share, there in ((0.6, 2), (0.7, 2), (0.3, 6), (0.1, 20), (0.333333, 6)):
        assert room({"GPU": share}, {"a": {"GPU": 2.0}}) == there
        assert pack([Process({"GPU": share})] * 25, machines(4, 2)).count(True) == there
        assert sizes(64, 2, resources={"GPU": share})["vae"].max_actors == there
    with pytest.raises(ClusterError, match="do not fit the 1 machines .* of one device"):
        sizes(16, 2, pools={"vae": {"num_gpus": 0.65, "min_size": 2}, "text_encoder": {"num_gpus": 0.65}})
    with pytest.raises(ClusterError, match="3 actors of 1 CPU and 0.65 GPU do not fit"):
        sizes(16, 2, num_workers=3, resources={"GPU": 0.65})
    assert pack([Process({"GPU": 0.5}), Process({"GPU": 1}), Process({"GPU": 0.5})], machines(4, 2)) == [True] * 3


def test_labels_leave_the_other_machines_alone() -> None:
    config = PreprocessConfig(model="m", dataset_base_path="d", node_labels={"stage": "encode"})
    pool = encoder_pools(config, GROUPS, MIXED)["vae"]
    assert (pool.min_actors, pool.max_actors, pool.selector) == (2, 2, {"stage": "encode"})
    demand = encoder_demand({"vae": pool}, {"vae": 9}, least=True)
    assert demand.bundles() == [{"CPU": 1.0, "GPU": 1.0}] * 2 + [{"CPU": 0.75}] * 2
    assert demand.selectors() == [{"stage": "encode"}] * 4
    assert scan_demand(config, MIXED).selectors() == [{"stage": "encode"}]
    one = replace(config, num_workers=3, node_labels={"stage": "train"}, accelerator_type="H100")
    with pytest.raises(ClusterError, match="no such machine"):
        raise ClusterError(str(Shortage([(ask, 0) for ask in demand_of(one).asks], MIXED, MIXED)))


def demand_of(config: PreprocessConfig) -> Demand:
    pools = encoder_pools(config, ("vae",), MIXED, growing=True)
    return encoder_demand(pools, {"vae": 99}, least=True)


def test_groups_on_machines_of_their_own() -> None:
    options: dict[str, Any] = {"pools": {"vae": {"num_gpus": 1}}, "node_labels": {"stage": "encode"}}
    config = PreprocessConfig(
        model="m", dataset_base_path="d", pool_labels={"text_encoder": {"stage": "train"}}, **options
    )
    found = encoder_pools(config, GROUPS, MIXED)
    assert [found[name].selector["stage"] for name in GROUPS] == ["encode", "train"]
    with pytest.raises(ConfigError, match="pool_labels: 'vea' is no group"):
        check_pools(replace(config, pool_labels={"vea": {}}), GROUPS)


def test_machines_that_are_not_there_yet_are_asked_for() -> None:
    nothing = Cluster({"head": {"CPU": 0.0}})
    config = PreprocessConfig(
        model="m", dataset_base_path="d", num_workers="2..16", node_labels={"stage": "encode"}, resources={"tpu": 1}
    )
    demand = encoder_demand(encoder_pools(config, ("vae",), nothing), {"vae": 5}, least=True)
    assert demand.bundles()[:5] == [{"CPU": 1.0, "GPU": 1.0, "tpu": 1}] * 5  # more than shards have nothing to do
    assert [(ask.what, fitting) for ask, fitting in demand.missing(nothing)] == [
        ("encoding actors of vae", 0),
        ("decode and write tasks", 0),
    ]
    assert encoder_demand(encoder_pools(config, ("vae",), nothing), {"vae": 5}, least=False).asks[0].least == 1
    assert generator_pool(generating(node_labels={"stage": "encode"}), 3, nothing).demand.bundles() == [
        {"CPU": 1.0, "GPU": 1.0}
    ]


def test_a_growing_cluster_is_no_reason_to_refuse() -> None:
    config = PreprocessConfig(model="m", dataset_base_path="d", num_workers=16)
    with pytest.raises(ClusterError, match="16 actors of 1 CPU and 1 GPU do not fit"):
        encoder_pools(config, ("vae",), machines(8, 1))
    pool = encoder_pools(config, ("vae",), machines(8, 1), growing=True)["vae"]
    assert (pool.min_actors, pool.max_actors) == (16, 16) and pool.actor_cpus + pool.decode_cpus <= 8
    busy = Cluster({"a": {"CPU": 8.0, "GPU": 2.0}})
    taken = Cluster({"a": {"CPU": 8.0, "GPU": 0.0}})
    ask = Ask("actors", Process({"GPU": 1.0}), 2, 2)
    shortage = Shortage(Demand((ask,)).missing(taken), busy, taken)
    assert shortage.busy and str(shortage) == (
        "2 actors of 1 GPU: 0 would fit; free are 0 of 2 GPU on 1 machines, others hold the rest"
    )
    assert not Shortage([(Ask("actors", Process({"GPU": 3.0}), 1, 1), 0)], busy, busy).busy


def test_a_group_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="'vea' is no group.*vae"):
        check_pools(PreprocessConfig(model="m", dataset_base_path="d", pools={"vea": {}}), GROUPS)


@pytest.mark.parametrize(
    ("cluster", "workers", "resources", "items", "expected"),
    [
        ((8, 0), 0, None, 9, GeneratorPool(1, 8, 0, {})),
        ((8, 0), 2, None, 9, GeneratorPool(2, 4, 0, {})),
        ((8, 4), 0, None, 9, GeneratorPool(4, 1, 1, {})),
        ((8, 4), 0, None, 3, GeneratorPool(3, 1, 1, {})),
        ((8, 4), 2, None, 9, GeneratorPool(2, 1, 1, {})),
        ((8, 4), 0, {"GPU": 0.5}, 99, GeneratorPool(8, 1, 0.5, {})),
        ((8, 4), 0, {"GPU": 2, "CPU": 3, "big": 1}, 9, GeneratorPool(2, 3, 2, {"big": 1})),
        ((8, 4), 0, {"GPU": 0}, 9, GeneratorPool(1, 8, 0, {})),
        ((8, 4), 3, {"CPU": 2}, 9, GeneratorPool(3, 2, 1, {})),
    ],
)
def test_how_many_actors_generate(
    cluster: tuple[float, float],
    workers: int,
    resources: dict[str, float] | None,
    items: int,
    expected: GeneratorPool,
) -> None:
    assert generator_pool(generating(num_workers=workers, resources=resources), items, machines(*cluster)) == expected


@pytest.mark.parametrize(("workers", "resources"), [(5, None), (1, {"GPU": 5}), (3, {"CPU": 3}), (9, {"GPU": 0})])
def test_generators_that_do_not_fit_are_refused(workers: int, resources: dict[str, float] | None) -> None:
    with pytest.raises(ClusterError, match="do not fit a cluster of 8 CPU and 4 GPU"):
        generator_pool(generating(num_workers=workers, resources=resources), 9, machines(8, 4))


def generating(**options: Any) -> GenerateConfig:
    return GenerateConfig(model="m", prompt="p", **options)


def training(cluster: Cluster, virtual_ranks: int | None = None, growing: bool = False, **options: Any) -> WorkerGroup:
    config = TrainConfig(model="m", dataset_base_path="c", **options)
    return worker_group(config, cluster, virtual_ranks, growing=growing)


def test_a_fixed_number_that_no_nodes_hold_is_refused() -> None:
    """Two workers of three CPUs do not fit nodes of four and two, though six would be enough."""
    nodes = Cluster({"a": {"CPU": 4.0}, "b": {"CPU": 2.0}})
    with pytest.raises(ClusterError, match="2 workers of 3 CPU .* do not fit .*: its 2 nodes hold 1 of {'CPU': 3"):
        training(nodes, num_workers=2, resources={"CPU": 3})
    assert training(nodes, num_workers="1..2", resources={"CPU": 3}).most == 2  # an elastic run waits


def test_a_machine_that_is_being_taken_away_gets_no_worker() -> None:
    nodes = Cluster({"a": {"CPU": 4.0, "GPU": 1.0}, "b": {"CPU": 4.0, "GPU": 1.0}}, leaving=frozenset("b"))
    with pytest.raises(ClusterError, match="its 2 nodes hold 1 of"):
        training(nodes, num_workers=2)
    assert training(nodes, num_workers="1..2") == WorkerGroup(1, 2, {"CPU": 1.0, "GPU": 1.0}, 2)
    check_sampler(Process({"GPU": 1.0}), WorkerGroup(1, 1, {"CPU": 1.0}), nodes)
    with pytest.raises(ClusterError, match="leaves no room"):
        check_sampler(Process({"GPU": 1.0}), WorkerGroup(1, 1, {"GPU": 1.0}), nodes)


@pytest.mark.parametrize(
    ("cluster", "options", "virtual_ranks", "expected"),
    [
        ((8, 0), {}, None, WorkerGroup(1, 1, {"CPU": 8}, 1)),
        ((8, 4), {}, None, WorkerGroup(4, 4, {"CPU": 1, "GPU": 1}, 4)),
        (
            (8, 4),
            {"resources": {"GPU": 2, "CPU": 3, "big": 0}},
            None,
            WorkerGroup(2, 2, {"CPU": 3, "GPU": 2, "big": 0}, 2),
        ),
        ((8, 0), {"num_workers": 2, "gradient_accumulation_steps": 3}, None, WorkerGroup(2, 2, {"CPU": 4}, 6)),
        ((8, 4), {"num_workers": "2..4"}, 8, WorkerGroup(2, 4, {"CPU": 1, "GPU": 1}, 8)),
        ((8, 4), {"num_workers": "3..4"}, 2, WorkerGroup(2, 2, {"CPU": 1, "GPU": 1}, 2)),  # a run of two goes on
    ],
)
def test_how_many_workers_train(
    cluster: tuple[float, float], options: dict[str, Any], virtual_ranks: int | None, expected: WorkerGroup
) -> None:
    assert training(machines(*cluster), virtual_ranks, **options) == expected


@pytest.mark.parametrize(
    ("group", "rooms", "chosen"),
    [
        (WorkerGroup(1, 8, {"GPU": 1}, virtual_ranks=8), [0, 1, 3, 8, 9], [0, 1, 3, 8, 8]),
        (WorkerGroup(2, 4, {"GPU": 1}, virtual_ranks=4), [1, 2, 3], [0, 2, 3]),
        (WorkerGroup(1, 8, {"GPU": 1}, virtual_ranks=8, even=True), [1, 3, 7, 8], [1, 2, 4, 8]),
        (WorkerGroup(2, 8, {"GPU": 1}, virtual_ranks=1), [1, 8], [1, 1]),
    ],
)
def test_as_many_workers_as_fit(group: WorkerGroup, rooms: list[int], chosen: list[int]) -> None:
    assert [group.choose(number) for number in rooms] == chosen


def test_room_is_counted_node_by_node() -> None:
    nodes = {"a": {"CPU": 4.0, "GPU": 1.0}, "b": {"CPU": 3.0}, "c": {"CPU": 1.0, "GPU": 4.0}}
    assert room({"CPU": 2}, nodes) == 3
    assert room({"CPU": 1, "GPU": 1}, nodes) == 2
    assert room({"CPU": 1, "GPU": 0.5}, nodes) == 3
    assert room({"CPU": 0}, nodes) >= 1000  # nothing is reserved


@pytest.mark.parametrize(
    ("gpus", "workers", "asked", "expected"),
    [
        (0.0, {"CPU": 1.0}, None, {}),
        (1.0, {"CPU": 1.0, "GPU": 1.0}, None, None),
        (2.0, {"CPU": 1.0, "GPU": 1.0}, None, {"GPU": 1.0}),
        (1.0, {"CPU": 1.0, "GPU": 0.5}, None, None),
        (1.0, {"CPU": 1.0}, None, {"GPU": 1.0}),
        (1.0, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.0}, {"CPU": 2.0}),
        (1.0, {"CPU": 1.0, "GPU": 1.0}, {}, {}),
    ],
)
def test_who_draws(
    gpus: float, workers: dict[str, float], asked: dict[str, float] | None, expected: dict[str, float] | None
) -> None:
    cluster, group = machines(4, gpus), WorkerGroup(1, 1, workers, 1)
    config = TrainConfig(model="m", dataset_base_path="c", sample_resources=asked, validation_prompts="a cat")
    assert sampler_process(config, group, cluster) == (None if expected is None else Process(expected))
    with pytest.raises(ClusterError, match="does not fit on any machine"):
        check_sampler(Process({"GPU": 2.0 + gpus}), group, cluster)


@pytest.mark.parametrize(
    ("workers", "asked", "fits"),
    [
        (WorkerGroup(2, 2, {"CPU": 1.0}), {"CPU": 2.0}, True),
        (WorkerGroup(4, 4, {"CPU": 1.0}), {"CPU": 1.0}, False),
        (WorkerGroup(1, 4, {"CPU": 1.0}), {"CPU": 1.0}, True),  # an elastic run does with fewer
        (WorkerGroup(2, 2, {"CPU": 2.0}), {"CPU": 0.5}, False),
        (WorkerGroup(2, 4, {"CPU": 1.0}, virtual_ranks=4, even=True), {"CPU": 1.0}, True),
        (WorkerGroup(1, 1, {"CPU": 1.0, "GPU": 1.0}), {"GPU": 1.0}, False),
    ],
)
def test_what_draws_leaves_room_for_the_workers(workers: WorkerGroup, asked: dict[str, float], fits: bool) -> None:
    cluster = Cluster({"a": {"CPU": 2.0, "GPU": 1.0}, "b": {"CPU": 2.0}})
    with nullcontext() if fits else pytest.raises(ClusterError, match="leaves no room for . workers of"):
        check_sampler(Process(asked), workers, cluster)


def test_training_counts_the_machines_with_its_labels_alone() -> None:
    """Two encode machines stand beside one to train on, which has fewer GPUs."""
    labels = {"a": {"stage": "encode"}, "b": {"stage": "encode"}, "c": {"stage": "train"}}
    cluster = Cluster({name: {"CPU": 8.0, "GPU": 2.0 if name == "c" else 4.0} for name in labels}, labels=labels)
    group = training(cluster, node_labels={"stage": "train"})
    assert group == WorkerGroup(2, 2, {"CPU": 1.0, "GPU": 1.0}, 2, selector={"stage": "train"})
    assert group.room(cluster) == 2 and training(cluster).most == 10
    with pytest.raises(ClusterError, match="3 workers of 1 CPU and 1 GPU with stage=train do not fit a cluster of 8"):
        training(cluster, node_labels={"stage": "train"}, num_workers=3)
    assert training(cluster, growing=True, node_labels={"stage": "train"}, num_workers=3).most == 3


def test_no_machine_is_up_yet(caplog: pytest.LogCaptureFixture) -> None:
    """Scaled to zero: a head without CPUs is no machine to train on, and what is to come has a GPU."""
    head = Cluster({"head": {"CPU": 0.0, "memory": 1e9}})
    gpu = {"CPU": 1.0, "GPU": 1.0}
    assert training(head, growing=True, num_workers="2..4") == WorkerGroup(2, 4, gpu, 4)
    assert training(head, growing=True, resources={"GPU": 0, "CPU": 2}, num_workers=3) == WorkerGroup(
        3, 3, {"CPU": 2}, 3
    )
    assert not caplog.records
    assert training(head, growing=True) == WorkerGroup(1, 1, gpu, 1)
    assert "no machine is up yet, so one worker trains; --num_workers 1..8 takes" in caplog.text
    # The same command after a kill, which began with eight workers.
    assert training(head, 16, growing=True, gradient_accumulation_steps=2) == WorkerGroup(1, 8, gpu, 16)
    with pytest.raises(ClusterError, match="1 workers of 1 CPU and 1 GPU do not fit a cluster of 0 CPU and 0 GPU"):
        training(head)  # where nothing would come
    with pytest.raises(ClusterError, match="divides the run's 4 virtual ranks, and --num_workers 3 has none"):
        training(head, 4, growing=True, num_workers=3, shard_base=True, resources={"CPU": 1})


def test_what_a_group_asks_for() -> None:
    group = WorkerGroup(2, 4, {"CPU": 1.0, "GPU": 1.0}, 8, selector={"stage": "train"})
    beside = Ask("actors", Process({"GPU": 1.0}, {"stage": "draw"}), 1, 1)
    demand = group.demand([beside])
    assert demand.bundles() == [{"CPU": 1.0, "GPU": 1.0}] * 4 + [{"GPU": 1.0}]
    assert demand.selectors() == [{"stage": "train"}] * 4 + [{"stage": "draw"}]
    assert [ask.most for ask in group.demand([beside], training=3).asks] == [1, 1]  # Ray Train asks for the three
    assert group.demand(training=4).asks == ()
    assert WorkerGroup(1, 8, {"CPU": 1.0}, 6, even=True).demand().asks[0].most == 6


def test_sample_images_have_machines_of_their_own() -> None:
    labels = {"t": {"stage": "train"}, "e": {"stage": "encode"}}
    cluster = Cluster({name: {"CPU": 4.0, "GPU": 1.0} for name in labels}, labels=labels)
    options: dict[str, Any] = {"model": "m", "dataset_base_path": "c", "validation_prompts": "a cat"}
    options["node_labels"] = {"stage": "train"}
    group = worker_group(TrainConfig(**options), cluster)
    assert sampler_process(TrainConfig(**options), group, cluster) is None  # the one GPU trains
    elsewhere = TrainConfig(**options, sample_node_labels={"stage": "encode"})
    assert sampler_process(elsewhere, group, cluster) == Process({"GPU": 1.0}, {"stage": "encode"})
    with pytest.raises(ClusterError, match="--sample_resources {'GPU': 1.0} with stage=train leaves no room for 1"):
        check_sampler(Process({"GPU": 1.0}, {"stage": "train"}), group, cluster)
