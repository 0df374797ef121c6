"""How many encoding actors a cluster has room for, beside what decodes for them and writes what they encode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ray_diffsynth.cluster.address import ClusterError
from ray_diffsynth.cluster.demand import Ask, Demand, amounts
from ray_diffsynth.cluster.labels import Selector, described
from ray_diffsynth.cluster.nodes import Cluster, Process, pack, room
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.errors import ConfigError, did_you_mean

DECODE_CPUS, WRITE_CPUS = 0.5, 0.25
"""CPUs of a decode and of a write task, where there are enough."""


@dataclass(frozen=True)
class EncoderPool:
    """Actors of a group, and what an actor, a decode and a write task reserve.

    others: Ray resources of an actor beside CPU and GPU. selector: labels of the machines for actors and tasks.
    """

    min_actors: int
    max_actors: int
    actor_cpus: float
    actor_gpus: float
    decode_cpus: float
    decode_tasks: int | None
    write_cpus: float
    others: Mapping[str, float] = field(default_factory=dict)
    selector: Selector = field(default_factory=dict)

    @property
    def actor(self) -> Process:
        return Process({"CPU": self.actor_cpus, "GPU": self.actor_gpus, **self.others}, self.selector)

    @property
    def tasks(self) -> Process:
        """A decode and a write task, which must find room at the same time as the actors."""
        return Process({"CPU": self.decode_cpus + self.write_cpus}, self.selector)


def check_pools(config: PreprocessConfig, groups: Sequence[str]) -> None:
    """Raise ConfigError if `pools` or `pool_labels` names a group that the model does not have."""
    for option, named in (("pools", config.pools), ("pool_labels", config.pool_labels)):
        for name in named or {}:
            if name not in groups:
                raise ConfigError(f"{option}: {name!r} is no group of this model; {did_you_mean(name, groups)}")


def batch_size(config: PreprocessConfig, group: str) -> int:
    """Samples that an actor of a group encodes at once."""
    return int((config.pools or {}).get(group, {}).get("batch_size", config.batch_size))


def pool_selector(config: PreprocessConfig, group: str) -> dict[str, str]:
    """The labels of a group's machines."""
    return {**config.selector, **(config.pool_labels or {}).get(group, {})}


def encoder_pools(
    config: PreprocessConfig, groups: Sequence[str], cluster: Cluster, *, growing: bool = False
) -> dict[str, EncoderPool]:
    """A pool for each group on this cluster, with room for decoding and writing beside the actors.

    Groups with `pools` share their machines; without, each group has all of its own. Where no machine has the labels of
    a group yet, an actor is taken to be one for each GPU. Ray Data hangs when an actor, its decode task and a write
    task do not fit the CPUs, so what they reserve is fractional. Raises ClusterError when the pools do not fit, unless
    the cluster is `growing`: then machines that are missing may come.
    """
    if config.pools is None:
        return {name: _whole_cluster(config, name, cluster, growing) for name in groups}
    found: dict[str, EncoderPool] = {}
    selectors = {name: pool_selector(config, name) for name in groups}
    for selector in selectors.values():  # groups with the same labels share the same machines
        if sharing := [name for name in groups if selectors[name] == selector and name not in found]:
            found |= _side_by_side(config, sharing, selector, cluster.select(selector), growing)
    return {name: found[name] for name in groups}


def encoder_demand(pools: Mapping[str, EncoderPool], shards: Mapping[str, int], *, least: bool) -> Demand:
    """What the pools of the groups want. shards: of each group, as more actors have nothing to do.

    least: whether the least number of each pool must have room; else it begins with one actor.
    """
    asks = []
    for name, pool in pools.items():
        most = max(1, min(pool.max_actors, shards[name]))
        asks.append(Ask(f"encoding actors of {name}", pool.actor, min(most, pool.min_actors) if least else 1, most))
        asks.append(Ask("decode and write tasks", pool.tasks, 1, most))
    return Demand(tuple(asks))


def scan_demand(config: PreprocessConfig, cluster: Cluster) -> Demand:
    """What reading the headers of the dataset's files wants: the machines of the first group that is given labels."""
    labels = next(iter((config.pool_labels or {}).values()), {})
    selector = {**labels, **config.selector}
    largest = max((node.get("CPU", 0.0) for node in cluster.select(selector).staying.values()), default=DECODE_CPUS)
    return Demand((Ask("tasks that read headers", Process({"CPU": min(DECODE_CPUS, largest / 2)}, selector), 1, 1),))


def _whole_cluster(config: PreprocessConfig, group: str, everything: Cluster, growing: bool) -> EncoderPool:
    """An actor per GPU, or one per two CPUs."""
    selector = pool_selector(config, group)
    cluster = everything.select(selector)
    cpus, gpus = cluster.cpus, cluster.gpus
    others = dict(config.resources or {})
    gpu = others.pop("GPU", 1.0 if gpus >= 1 or not cluster.nodes else 0.0)
    asked_cpu = others.pop("CPU", None)
    least, most = config.worker_range
    if most == 0:
        fitting = room({"GPU": gpu, **others}, cluster.nodes) if gpu else max(1, int(cpus // 2))
        least = most = max(1, fitting)
    if not cluster.nodes:  # to be asked for
        cpu = 1.0 if asked_cpu is None else asked_cpu
        return EncoderPool(least, most, cpu, gpu, DECODE_CPUS, None, WRITE_CPUS, others, selector)
    # Without GPUs nothing holds actors off from the CPUs that decoding needs, so all that there may be are counted.
    here = room({"GPU": gpu}, cluster.nodes) if gpu else int(cpus // 2) if growing else most
    counted = max(1, min(most, here))
    cpu = _default_cpus(cluster, counted, growing) if asked_cpu is None else asked_cpu
    reserved = {"CPU": cpu, "GPU": gpu, **others}
    if not growing and (room(reserved, cluster.nodes) < least or least * cpu >= cpus):
        raise ClusterError(
            f"{least} actors of {cpu:g} CPU and {gpu:g} GPU{_and(others)} do not fit a cluster of {cpus:g} CPU and "
            f"{gpus:g} GPU{described(selector)} beside their decode and write tasks; lower --num_workers or --resources"
        )
    fitting = min(most, room(reserved, cluster.nodes))
    if not gpu and not growing:
        most = fitting if fitting * cpu < cpus else least
    decode, write = _tasks(cpus - min(fitting, most) * cpu, 1)
    return EncoderPool(
        least, most, cpu, gpu, decode, config.dataset_num_workers or None, write, others=others, selector=selector
    )


def _and(others: Mapping[str, float]) -> str:
    return f" and {amounts(others)}" if any(others.values()) else ""


def _side_by_side(
    config: PreprocessConfig, groups: Sequence[str], selector: Selector, cluster: Cluster, growing: bool
) -> dict[str, EncoderPool]:
    cpus, gpus = cluster.cpus, cluster.gpus
    pools = {name: (config.pools or {}).get(name, {}) for name in groups}
    # Where no share is given: a GPU each, or equal parts of what there is, cut to hundredths.
    share = 1.0 if gpus >= len(groups) or not cluster.nodes else int(100 * gpus / len(groups)) / 100
    least = {name: int(pool.get("min_size", 1)) for name, pool in pools.items()}
    most = {name: int(pool.get("max_size", least[name])) for name, pool in pools.items()}
    gpu = {name: pool.get("num_gpus", share) for name, pool in pools.items()}
    default_cpu = _default_cpus(cluster, sum(most.values()), growing) if cluster.nodes else 1.0
    cpu = {name: pool.get("num_cpus", default_cpu) for name, pool in pools.items()}
    decode, write = DECODE_CPUS, WRITE_CPUS
    if cluster.nodes and not growing:
        _check_side_by_side(groups, least, cpu, gpu, cluster)
        held = sum(most[name] * cpu[name] for name in groups)
        free = cpus - (held if held < cpus else sum(least[name] * cpu[name] for name in groups))
        decode, write = _tasks(free, len(groups))
    tasks = config.dataset_num_workers or None
    return {
        name: EncoderPool(least[name], most[name], cpu[name], gpu[name], decode, tasks, write, selector=selector)
        for name in groups
    }


def _check_side_by_side(
    groups: Sequence[str],
    least: Mapping[str, int],
    cpu: Mapping[str, float],
    gpu: Mapping[str, float],
    cluster: Cluster,
) -> None:
    """Raise ClusterError when the least of the pools does not fit, in sum or machine by machine and GPU by GPU."""
    each = {name: f"{name}: {least[name]} x " for name in groups}
    for what, amount, there, spare in (("CPU", cpu, cluster.cpus, True), ("GPU", gpu, cluster.gpus, False)):
        needed = sum(least[name] * amount[name] for name in groups)
        if needed > there + 1e-6 or (spare and needed >= there):
            shares = ", ".join(f"{each[name]}{amount[name]:g}" for name in groups)
            raise ClusterError(
                f"the pools need {needed:g} {what} at least ({shares}), the cluster has {there:g}"
                f"{', and decoding and writing need some too' if spare else ''}; lower min_size or num_{what.lower()}s"
            )
    order = sorted(groups, key=lambda name: (gpu[name], cpu[name]), reverse=True)
    actors = [Process({"CPU": cpu[name], "GPU": gpu[name]}) for name in order for _ in range(least[name])]
    if not all(pack(actors, cluster)):
        shares = ", ".join(f"{each[name]}{amounts({'CPU': cpu[name], 'GPU': gpu[name]})}" for name in groups)
        raise ClusterError(
            f"the pools do not fit the {cluster.machines} machines of the cluster ({shares}): an actor is on one "
            "machine, and its part of a GPU is of one device; lower min_size, num_gpus or num_cpus"
        )


def _default_cpus(cluster: Cluster, actors: int, growing: bool) -> float:
    """CPUs of an actor that says nothing of them: half of what there is for all actors.

    On several machines a quarter: when half of them are lost, their actors start again on the others, and otherwise
    would leave no CPU for the decode tasks that they wait for. Likewise where more machines may come: Ray Data keeps
    CPUs for decoding and writing before it starts an actor on a new one.
    """
    alone = cluster.machines == 1 and not growing
    return min(1.0, (0.5 if alone else 0.25) * cluster.cpus / actors)


def _tasks(free_cpus: float, groups: int) -> tuple[float, float]:
    """CPUs of a decode and of a write task, so that one of each fits for every group."""
    return min(DECODE_CPUS, free_cpus / 2 / groups), min(WRITE_CPUS, free_cpus / 4 / groups)
