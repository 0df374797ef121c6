"""How many workers train, and whether the actor that makes their sample images has room beside them."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ray_diffsynth.cluster.address import ClusterError
from ray_diffsynth.cluster.demand import Ask, Demand
from ray_diffsynth.cluster.labels import Selector, described
from ray_diffsynth.cluster.nodes import Cluster, Process, pack, room
from ray_diffsynth.config import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerGroup:
    """Which numbers of workers a run may have.

    virtual_ranks: microbatches of a step, which the workers share; None for a new run. even: they must divide among
    the workers. resources: of one worker, as Ray names them. selector: labels of the machines where they may be.
    """

    least: int
    most: int
    resources: Mapping[str, float]
    virtual_ranks: int | None = None
    even: bool = False
    selector: Selector = field(default_factory=dict)

    @property
    def elastic(self) -> bool:
        return self.least < self.most

    @property
    def worker(self) -> Process:
        return Process(self.resources, self.selector)

    @property
    def numbers(self) -> list[int]:
        """The numbers of workers that it may have."""
        ranks = self.virtual_ranks or self.most
        least, most = min(self.least, ranks), min(self.most, ranks)
        return [n for n in range(least, most + 1) if not (self.even and self.virtual_ranks and self.virtual_ranks % n)]

    def choose(self, room: int) -> int:
        """The most workers for which there is room; 0 if not even the least."""
        return max((number for number in self.numbers if number <= room), default=0)

    def room(self, cluster: Cluster, beside: Sequence[Ask] = ()) -> int:
        """For how many workers the machines have room beside other processes; 0 if these have none themselves."""
        first = [ask.process for ask in beside for _ in range(ask.most)]
        workers = [self.worker] * self.most
        fits = pack([*first, *workers], cluster)
        return sum(fits[len(first) :]) if all(fits[: len(first)]) else 0

    def demand(self, beside: Sequence[Ask] = (), *, training: int = 0) -> Demand:
        """What the group wants, and what is beside it. training: workers that train now, for whom Ray Train asks."""
        least, most = 0 if training else self.numbers[0], self.numbers[-1] - training
        asks = (Ask("training workers", self.worker, least, most),) if most > 0 else ()
        return Demand((*asks, *beside))


def worker_group(
    config: TrainConfig, everything: Cluster, virtual_ranks: int | None = None, *, growing: bool = False
) -> WorkerGroup:
    """Numbers of workers that train, and what each reserves: a GPU where there are some, else a share of a node's CPUs.

    virtual_ranks: those of the run that is gone on with; None for a new one, which gets a microbatch for each worker
    and step of accumulation. Where no machine has the labels yet a worker has a GPU, and without --num_workers there is
    one of them, or up to as many as the run began with. Raises ClusterError when a fixed number does not fit the
    machines that stay, which would wait for ever, unless the cluster is `growing`; an elastic run waits.
    """
    wanted = dict(config.resources or {})
    cluster = everything.select(config.selector)
    machines = [node for node in cluster.nodes.values() if node.get("CPU") or node.get("GPU")]
    gpu = wanted.pop("GPU", 1.0 if cluster.gpus >= 1 or not machines else 0.0)
    least, most = config.worker_range
    if most == 0:
        others = {name: amount for name, amount in wanted.items() if name != "CPU"}
        least, most = _chosen_by_cluster(config, cluster, {"GPU": gpu, **others}, machines, virtual_ranks)
    if virtual_ranks is not None and virtual_ranks < most:
        message = "the run was started with %d virtual ranks, so %d workers go on with it, not %d"
        logger.warning(message, virtual_ranks, virtual_ranks, most)
        least, most = min(least, virtual_ranks), virtual_ranks
    largest = max((node.get("CPU", 0.0) for node in machines), default=0.0)
    cpu = wanted.pop("CPU", 1.0 if gpu else max(1.0, largest // math.ceil(most / max(1, len(machines)))))
    resources = {"CPU": cpu, **({"GPU": gpu} if gpu else {}), **wanted}
    if least == most and not growing and (fitting := room(resources, cluster.staying)) < most:
        raise ClusterError(
            f"{most} workers of {cpu:g} CPU and {gpu:g} GPU{described(config.selector)} do not fit a cluster of "
            f"{cluster.cpus:g} CPU and {cluster.gpus:g} GPU: its {cluster.machines} nodes hold {fitting} of "
            f"{resources}; lower --num_workers or --resources"
        )
    virtual_ranks = virtual_ranks or most * config.gradient_accumulation_steps
    group = WorkerGroup(least, most, resources, virtual_ranks, config.shard_base, config.selector)
    if not group.numbers:
        raise ClusterError(
            f"--shard_base needs a number of workers that divides the run's {virtual_ranks} virtual ranks, and "
            f"--num_workers {config.num_workers} has none; give another"
        )
    return group


def _chosen_by_cluster(
    config: TrainConfig,
    cluster: Cluster,
    resources: Mapping[str, float],
    machines: Sequence[Mapping[str, float]],
    virtual_ranks: int | None,
) -> tuple[int, int]:
    """Least and most workers where no number is given: one for each GPU of the cluster."""
    if machines:
        number = max(1, room(resources, cluster.nodes)) if resources["GPU"] else 1
        return number, number
    most = max(1, (virtual_ranks or 1) // config.gradient_accumulation_steps)
    if most == 1:
        logger.warning("no machine is up yet, so one worker trains; --num_workers 1..8 takes up to eight that come")
    return 1, most


def sampler_process(config: TrainConfig, group: WorkerGroup, everything: Cluster) -> Process | None:
    """What the actor that makes sample images reserves, and where; None if the workers leave it no GPU and draw.

    Without GPUs and --sample_resources it reserves nothing, and computes beside the workers.
    """
    selector = config.selector if config.sample_node_labels is None else config.sample_node_labels
    if config.sample_resources is not None:
        return Process(dict(config.sample_resources), selector)
    if not everything.select(selector).gpus:
        return Process({}, selector)
    found = Process({"GPU": 1.0}, selector)
    return found if pack([*[group.worker] * group.most, found], everything)[-1] else None


def check_sampler(process: Process, group: WorkerGroup, cluster: Cluster) -> None:
    """Raise ClusterError for --sample_resources that no machine has, or that the workers need, in a cluster that stays
    as it is: both would wait for ever.
    """
    fix = "lower it, or leave it out: where no GPU is left the workers draw between steps"
    what = f"--sample_resources {dict(process.resources)}{described(process.selector)}"
    if not pack([process], cluster)[0]:
        raise ClusterError(f"{what} does not fit on any machine of the cluster; {fix}")
    for node, there in cluster.select(process.selector).staying.items():
        left = {name: amount - process.resources.get(name, 0.0) for name, amount in there.items()}
        with_it = replace(cluster, nodes={**cluster.nodes, node: left})
        if room(process.resources, {node: there}) and group.choose(group.room(with_it)):
            break
    else:
        raise ClusterError(
            f"{what} leaves no room for {group.least} workers of {dict(group.resources)} in the cluster; {fix}"
        )
