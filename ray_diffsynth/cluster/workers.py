"""How many workers train, and whether the actor that makes their sample images has room beside them."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ray_diffsynth.cluster.address import ClusterError
from ray_diffsynth.cluster.nodes import Cluster, room
from ray_diffsynth.config import TrainConfig

logger = logging.getLogger(__name__)


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
