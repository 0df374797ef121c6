"""How many actors make images."""

from collections.abc import Mapping
from dataclasses import dataclass

from ray_diffsynth.cluster.address import ClusterError
from ray_diffsynth.cluster.nodes import Cluster


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
