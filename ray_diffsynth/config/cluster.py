"""The machines: how many processes, what each reserves, which Ray they are on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ray_diffsynth.config.effects import WORKERS
from ray_diffsynth.config.options import Component, option
from ray_diffsynth.errors import ConfigError, did_you_mean

POOL_KEYS = ("num_gpus", "num_cpus", "batch_size", "min_size", "max_size")
"""What ``pools`` says of a group's actors."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Component):
    """The actors or workers of a job."""

    section = "cluster"
    title = "Cluster"

    num_workers: int = option(0, least=0, identity=False, effects=(WORKERS,))
    """Actors (preprocess) or workers (train); 0 is one per GPU of the cluster, or one without GPUs."""
    resources: dict[str, float] | None = option(None, identity=False, effects=(WORKERS,))
    """Ray resources of one actor or worker, e.g. {"GPU": 1, "CPU": 4}; one GPU each where there are some."""
    ray_address: str | None = option(None, identity=False)
    """Ray cluster to join, e.g. auto; when not given, the one of RAY_ADDRESS or a local one made for this job."""

    def check(self) -> None:
        """Raise ConfigError for a resource that is not an amount."""
        for name, amount in (self.resources or {}).items():
            if not math.isfinite(amount) or amount < 0:
                raise ConfigError(f"resources: {name}={amount} is not an amount; use a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(ClusterConfig):
    """The workers of a training, whose number may change while it runs."""

    num_workers: int | str = option(0, identity=False)  # type: ignore[assignment]  # a range too
    """Workers; 1..8 for as many as there are, which may come and go; 0 is one per GPU, or one without GPUs."""

    def check(self) -> None:
        """Raise ConfigError for what is no number of workers."""
        worker_range(self.num_workers)

    @property
    def worker_range(self) -> tuple[int, int]:
        """Least and most workers; (0, 0) leaves the number to the cluster."""
        return worker_range(self.num_workers)


@dataclass(frozen=True, kw_only=True)
class PoolConfig(Component):
    """Actors of each group of encoders, where the groups run side by side."""

    section = "pool"
    title = "Cluster"

    pools: dict[str, dict[str, float]] | None = None
    """Encode the groups side by side: for each its actors, e.g. {"vae": {"num_gpus": 0.3, "batch_size": 4}}; the keys
    are num_gpus, num_cpus, batch_size, min_size and max_size."""

    def check(self) -> None:
        """Raise ConfigError for a pool that cannot be."""
        for group, pool in (self.pools or {}).items():
            for name, value in pool.items():
                if name not in POOL_KEYS:
                    raise ConfigError(f"pools: {group}: {name} is not known; {did_you_mean(name, POOL_KEYS)}")
                whole = name not in ("num_gpus", "num_cpus")
                if not math.isfinite(value) or value < 0 or (whole and (value < 1 or value != int(value))):
                    kind = "a whole number from 1" if whole else "a number of at least 0"
                    raise ConfigError(f"pools: {group}: {name}={value} is not {kind}")
            if pool.get("min_size", 1) > pool.get("max_size", math.inf):
                raise ConfigError(
                    f"pools: {group}: min_size={pool['min_size']:g} is above max_size={pool['max_size']:g}"
                )


def worker_range(num_workers: int | str) -> tuple[int, int]:
    """``2`` -> (2, 2); ``"1..8"`` -> (1, 8); 0, chosen by the machine, -> (0, 0). Raises ConfigError."""
    text = str(num_workers).strip()
    if text.isdigit():
        return int(text), int(text)
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"num_workers={num_workers!r} is no number of workers; write 2, or 1..8 for an elastic run")
    return int(found[1]), int(found[2])
