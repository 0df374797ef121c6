"""How much of a cluster the actors and workers of the jobs take: pure functions of options and cluster."""

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ray_diffsynth.config import PreprocessConfig, TrainConfig
from ray_diffsynth.errors import ConfigError, did_you_mean
from ray_diffsynth.ray_address import ClusterError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """The machines of a cluster that are alive.

    nodes: id -> its Ray resources, `CPU` and `GPU` among them. leaving: ids of those that are being taken away.
    """

    nodes: Mapping[str, Mapping[str, float]]
    leaving: frozenset[str] = field(default=frozenset())

    @property
    def staying(self) -> dict[str, Mapping[str, float]]:
        """The nodes that are not being taken away."""
        return {node: resources for node, resources in self.nodes.items() if node not in self.leaving}

    def total(self, resource: str) -> float:
        """What all machines have of a resource."""
        return sum(node.get(resource, 0.0) for node in self.nodes.values())

    @property
    def cpus(self) -> float:
        return self.total("CPU")

    @property
    def gpus(self) -> float:
        return self.total("GPU")

    @property
    def machines(self) -> int:
        return len(self.nodes)


@dataclass(frozen=True)
class EncoderPool:
    """Actors of a group, the samples that one encodes at once, and what an actor, a decode and a write task reserve."""

    min_actors: int
    max_actors: int
    batch_size: int
    actor_cpus: float
    actor_gpus: float
    decode_cpus: float
    decode_tasks: int | None
    write_cpus: float


def check_pools(config: PreprocessConfig, groups: Sequence[str]) -> None:
    """Raise ConfigError if `pools` names a group that the model does not have."""
    for name in config.pools or {}:
        if name not in groups:
            raise ConfigError(f"pools: {name!r} is no group of this model; {did_you_mean(name, groups)}")


def encoder_pools(config: PreprocessConfig, groups: Sequence[str], cluster: Cluster) -> dict[str, EncoderPool]:
    """A pool for each group on this cluster, with room for decoding and writing beside the actors.

    Ray Data hangs when an actor, its decode task and a write task do not fit the CPUs, so what they reserve is
    fractional. Raises ClusterError when the pools do not fit.
    """
    if config.pools is None:
        size = _whole_cluster(config, cluster)
        return dict.fromkeys(groups, size)
    return _side_by_side(config, groups, cluster)


def _whole_cluster(config: PreprocessConfig, cluster: Cluster) -> EncoderPool:
    """An actor per GPU, or one per two CPUs."""
    cpus, gpus = cluster.cpus, cluster.gpus
    wanted = dict(config.resources or {})
    gpu = wanted.pop("GPU", 1.0 if gpus >= 1 else 0.0)
    actors = config.num_workers or (max(1, int(gpus // gpu)) if gpu else max(1, int(cpus // 2)))
    cpu = wanted.pop("CPU", _default_cpus(cluster, actors))
    if wanted:
        raise ClusterError(f"resources={sorted(wanted)} are not known; CPU and GPU are")
    if actors * gpu > gpus or actors * cpu >= cpus:
        raise ClusterError(
            f"{actors} actors of {cpu:g} CPU and {gpu:g} GPU do not fit a cluster of {cpus:g} CPU and {gpus:g} GPU "
            "beside their decode and write tasks; lower --num_workers or --resources"
        )
    decode, write = _tasks(cpus - actors * cpu, 1)
    return EncoderPool(actors, actors, config.batch_size, cpu, gpu, decode, config.dataset_num_workers or None, write)


def _side_by_side(config: PreprocessConfig, groups: Sequence[str], cluster: Cluster) -> dict[str, EncoderPool]:
    cpus, gpus = cluster.cpus, cluster.gpus
    pools = {name: (config.pools or {}).get(name, {}) for name in groups}
    # Where no share is given: a GPU each, or equal parts of what there is, cut to hundredths.
    share = 1.0 if gpus >= len(groups) else int(100 * gpus / len(groups)) / 100
    least = {name: int(pool.get("min_size", 1)) for name, pool in pools.items()}
    most = {name: int(pool.get("max_size", least[name])) for name, pool in pools.items()}
    gpu = {name: pool.get("num_gpus", share) for name, pool in pools.items()}
    default_cpu = _default_cpus(cluster, sum(most.values()))
    cpu = {name: pool.get("num_cpus", default_cpu) for name, pool in pools.items()}
    for what, amount, there, spare in (("CPU", cpu, cpus, True), ("GPU", gpu, gpus, False)):
        needed = sum(least[name] * amount[name] for name in groups)
        if needed > there + 1e-6 or (spare and needed >= there):
            each = ", ".join(f"{name}: {least[name]} x {amount[name]:g}" for name in groups)
            raise ClusterError(
                f"the pools need {needed:g} {what} at least ({each}), the cluster has {there:g}"
                f"{', and decoding and writing need some too' if spare else ''}; lower min_size or num_{what.lower()}s"
            )
    held = sum(most[name] * cpu[name] for name in groups)
    free = cpus - (held if held < cpus else sum(least[name] * cpu[name] for name in groups))
    decode, write = _tasks(free, len(groups))
    return {
        name: EncoderPool(
            least[name],
            most[name],
            int(pools[name].get("batch_size", config.batch_size)),
            cpu[name],
            gpu[name],
            decode,
            config.dataset_num_workers or None,
            write,
        )
        for name in groups
    }


def _default_cpus(cluster: Cluster, actors: int) -> float:
    """CPUs of an actor that says nothing of them: half of what there is for all actors.

    On several machines a quarter: when half of them are lost, their actors start again on the others, and otherwise
    would leave no CPU for the decode tasks that they wait for.
    """
    return min(1.0, (0.5 if cluster.machines == 1 else 0.25) * cluster.cpus / actors)


def _tasks(free_cpus: float, groups: int) -> tuple[float, float]:
    """CPUs of a decode and of a write task, so that one of each fits for every group."""
    return min(0.5, free_cpus / 2 / groups), min(0.25, free_cpus / 4 / groups)


@dataclass(frozen=True)
class GeneratorPool:
    """Actors, and the Ray resources that each reserves."""

    actors: int
    cpus: float
    gpus: float
    others: dict[str, float]


def generator_pool(
    num_workers: int, resources: Mapping[str, float] | None, items: int, cluster: Cluster
) -> GeneratorPool:
    """An actor per GPU, or one with all CPUs where there are none; no more than items.

    Raises ClusterError when they do not fit the cluster, which would wait for ever.
    """
    cpus, gpus = cluster.cpus, cluster.gpus
    others = dict(resources or {})
    gpu = others.pop("GPU", 1.0 if gpus >= 1 else 0.0)
    actors = min(num_workers or (max(1, int(gpus // gpu)) if gpu else 1), max(items, 1))
    cpu = others.pop("CPU", 1.0 if gpu else max(1.0, cpus // actors))
    if actors * gpu > gpus or actors * cpu > cpus:
        raise ClusterError(
            f"{actors} actors of {cpu:g} CPU and {gpu:g} GPU do not fit a cluster of {cpus:g} CPU and {gpus:g} GPU; "
            "lower --num_workers or --resources"
        )
    return GeneratorPool(actors, cpu, gpu, others)


@dataclass(frozen=True)
class WorkerGroup:
    """Which numbers of workers a run may have.

    virtual_ranks: microbatches of a step, which the workers share; None for a new run. even: they must divide among
    the workers. resources: of one worker, as Ray names them.
    """

    least: int
    most: int
    resources: Mapping[str, float]
    virtual_ranks: int | None = None
    even: bool = False

    @property
    def elastic(self) -> bool:
        return self.least < self.most

    def choose(self, room: int) -> int:
        """The most workers for which there is room; 0 if not even the least."""
        most = min(self.most, room, self.virtual_ranks or self.most)
        least = min(self.least, most) if self.virtual_ranks and self.virtual_ranks < self.least else self.least
        fitting = [
            n for n in range(least, most + 1) if not (self.even and self.virtual_ranks and self.virtual_ranks % n)
        ]
        return max(fitting, default=0)


def room(resources: Mapping[str, float], nodes: Mapping[str, Mapping[str, float]]) -> int:
    """How many processes of `resources` the nodes (id -> resources, all of them or what is free) have room for."""
    wanted = {name: amount for name, amount in resources.items() if amount > 0}
    if not wanted:
        return sys.maxsize
    return sum(
        min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items())
        for node in nodes.values()
    )


def fits_beside(other: Mapping[str, float], group: WorkerGroup, nodes: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether the least number of workers has room where something else takes `other` on one of the nodes."""
    for name, node in nodes.items():
        left = {key: amount - other.get(key, 0.0) for key, amount in node.items()}
        if room(other, {name: node}) and group.choose(room(group.resources, {**nodes, name: left})):
            return True
    return False


def worker_group(config: TrainConfig, cluster: Cluster, virtual_ranks: int | None = None) -> WorkerGroup:
    """Numbers of workers that train, and what each reserves: a GPU where there are some, else a share of a node's CPUs.

    virtual_ranks: those of the run that is gone on with; None for a new one, which gets a microbatch for each worker
    and step of accumulation. Raises ClusterError when a fixed number does not fit the machines that stay, which would
    wait for ever; an elastic run waits.
    """
    wanted = dict(config.resources or {})
    gpu = wanted.pop("GPU", 1.0 if cluster.gpus >= 1 else 0.0)
    least, most = config.worker_range
    if most == 0:
        least = most = max(1, int(cluster.gpus // gpu)) if gpu else 1
    if virtual_ranks is not None and virtual_ranks < most:
        message = "the run was started with %d virtual ranks, so %d workers go on with it, not %d"
        logger.warning(message, virtual_ranks, virtual_ranks, most)
        least, most = min(least, virtual_ranks), virtual_ranks
    largest = max(node.get("CPU", 0.0) for node in cluster.nodes.values())
    cpu = wanted.pop("CPU", 1.0 if gpu else max(1.0, largest // math.ceil(most / cluster.machines)))
    resources = {"CPU": cpu, **({"GPU": gpu} if gpu else {}), **wanted}
    if least == most and (fitting := room(resources, cluster.staying)) < most:
        raise ClusterError(
            f"{most} workers of {cpu:g} CPU and {gpu:g} GPU do not fit a cluster of {cluster.cpus:g} CPU and "
            f"{cluster.gpus:g} GPU: its {cluster.machines} nodes hold {fitting} of {resources}; lower --num_workers or "
            "--resources"
        )
    virtual_ranks = virtual_ranks or most * config.gradient_accumulation_steps
    return WorkerGroup(least, most, resources, virtual_ranks, even=config.shard_base)


def sampler_resources(
    wanted: Mapping[str, float] | None, group: WorkerGroup, cluster: Cluster
) -> dict[str, float] | None:
    """What the actor that makes sample images reserves; None if the workers leave it no GPU and draw themselves.

    wanted: --sample_resources. Without GPUs it reserves nothing, and computes beside the workers. Raises ClusterError
    for what no machine has, or what the workers need, which would wait for ever.
    """
    if wanted is not None:
        fix = "lower it, or leave it out: where no GPU is left the workers draw between steps"
        if room(wanted, cluster.staying) < 1:
            raise ClusterError(f"--sample_resources {dict(wanted)} does not fit on any machine of the cluster; {fix}")
        if not fits_beside(wanted, group, cluster.staying):
            raise ClusterError(
                f"--sample_resources {dict(wanted)} leaves no room for {group.least} workers of "
                f"{dict(group.resources)} in the cluster; {fix}"
            )
        return dict(wanted)
    if not cluster.gpus:
        return {}
    return {"GPU": 1.0} if cluster.gpus - group.most * group.resources.get("GPU", 0.0) >= 1 else None
