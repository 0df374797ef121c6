"""How many encoding actors a cluster has room for, beside what decodes for them and writes what they encode."""

from collections.abc import Sequence
from dataclasses import dataclass

from ray_diffsynth.cluster.address import ClusterError
from ray_diffsynth.cluster.nodes import Cluster
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.errors import ConfigError, did_you_mean


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
