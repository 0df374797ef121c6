"""How many actors make images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_diffsynth.cluster.address import ClusterError
from ray_diffsynth.cluster.demand import Ask, Demand
from ray_diffsynth.cluster.labels import Selector, described
from ray_diffsynth.cluster.nodes import Cluster, Process, room
from ray_diffsynth.config import GenerateConfig


@dataclass(frozen=True)
class GeneratorPool:
    """Actors, the Ray resources that each reserves, and the labels of their machines."""

    actors: int
    cpus: float
    gpus: float
    others: Mapping[str, float]
    selector: Selector = field(default_factory=dict)

    @property
    def actor(self) -> Process:
        return Process({"CPU": self.cpus, "GPU": self.gpus, **self.others}, self.selector)

    @property
    def demand(self) -> Demand:
        return Demand((Ask("generating actors", self.actor, self.actors, self.actors),))


def generator_pool(config: GenerateConfig, items: int, everything: Cluster, *, growing: bool = False) -> GeneratorPool:
    """An actor per GPU, or one with all CPUs where there are none; no more than items.

    Where no machine has the labels yet, one with a GPU. Raises ClusterError when they do not fit the cluster,
    unless it is `growing`: then machines that are missing may come.
    """
    selector = config.selector
    cluster = everything.select(selector)
    others = dict(config.resources or {})
    gpu = others.pop("GPU", 1.0 if cluster.gpus >= 1 or not cluster.nodes else 0.0)
    fitting = room({"GPU": gpu, **others}, cluster.nodes) if gpu and cluster.nodes else 1
    actors = min(config.num_workers or max(1, fitting), max(items, 1))
    cpu = others.pop("CPU", 1.0 if gpu else max(1.0, cluster.cpus // actors))
    pool = GeneratorPool(actors, cpu, gpu, others, selector)
    if cluster.nodes and not growing and room(pool.actor.resources, cluster.nodes) < actors:
        raise ClusterError(
            f"{actors} actors of {cpu:g} CPU and {gpu:g} GPU do not fit a cluster of {cluster.cpus:g} CPU and "
            f"{cluster.gpus:g} GPU{described(selector)}; lower --num_workers or --resources"
        )
    return pool
