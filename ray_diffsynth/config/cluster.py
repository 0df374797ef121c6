"""The machines: how many processes, what each reserves, which Ray they are on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ray_diffsynth.config.effects import WORKERS
from ray_diffsynth.config.options import Component, option, split_names
from ray_diffsynth.errors import ConfigError, did_you_mean

ACCELERATOR_LABEL = "ray.io/accelerator-type"
"""Label by which Ray says what GPU a node has."""
_NAME = "[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL = re.compile(rf"(?:[a-zA-Z0-9][a-zA-Z0-9.-]{{0,252}}/)?{_NAME}")
_CONDITION = re.compile(rf"!?(?:{_NAME}|in\({_NAME}(?:, ?{_NAME})*\))")
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
    node_labels: dict[str, str] | None = option(None, identity=False)
    """Use only machines with these labels of Ray, e.g. {"stage": "encode"}; a value may be !a, in(a,b) or !in(a,b)."""
    accelerator_type: str | None = option(None, identity=False)
    """Use only machines with this GPU, e.g. H100, by Ray's label ray.io/accelerator-type."""
    wait_minutes: float = option(30.0, least=0, identity=False)
    """How long to wait for machines that are not there yet, or busy; then the job ends and says what was missing."""
    ray_address: str | None = option(None, identity=False)
    """Ray cluster to join, e.g. auto; when not given, the one of RAY_ADDRESS or a local one made for this job."""
    env: str | None = option(None, many=",", identity=False)
    """Names of variables, comma-separated, that the job's processes on all machines get from where it runs, beside
    NCCL_*, TORCH_*, HF_*, AWS_* and the like. Names only: values in arguments would stand in Ray's dashboard."""

    @property
    def env_names(self) -> tuple[str, ...]:
        """The names of `env`."""
        return split_names(self.env)

    def check(self) -> None:
        """Raise ConfigError for a resource that is not an amount, and for what is no selector of labels, or no name."""
        for name in self.env_names:
            if "=" in name:
                name = name.partition("=")[0]
                raise ConfigError(
                    f"env: {name}=… has a value, and what stands in a command's arguments is shown in Ray's dashboard; "
                    f"export {name} where the job runs, and give the name alone"
                )
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ConfigError(f"env: {name!r} is no name of a variable; write names, with commas between them")
        for name, amount in (self.resources or {}).items():
            if not math.isfinite(amount) or amount < 0:
                raise ConfigError(f"resources: {name}={amount} is not an amount; use a number of at least 0")
        check_labels("node_labels", self.node_labels)
        check_labels("accelerator_type", {ACCELERATOR_LABEL: self.accelerator_type} if self.accelerator_type else None)
        if self.accelerator_type and ACCELERATOR_LABEL in (self.node_labels or {}):
            raise ConfigError(f"node_labels: {ACCELERATOR_LABEL} is what accelerator_type says; give one of the two")
        if not math.isfinite(self.wait_minutes):
            raise ConfigError(f"wait_minutes={self.wait_minutes} is not a time; use a number of minutes")

    @property
    def selector(self) -> dict[str, str]:
        """The labels that a machine must have to be used: label -> condition, in Ray's words; empty if any will do."""
        accelerator = {ACCELERATOR_LABEL: self.accelerator_type} if self.accelerator_type else {}
        return {**(self.node_labels or {}), **accelerator}


@dataclass(frozen=True, kw_only=True)
class ElasticConfig(ClusterConfig):
    """Actors or workers whose number may change while the job runs."""

    num_workers: int | str = option(0, identity=False, effects=(WORKERS,))  # type: ignore[assignment]  # a range too
    """Actors (preprocess) or workers (train); 1..8 for as many as there are, which may come and go; 0 is one per GPU,
    or one without GPUs."""

    def check(self) -> None:
        """Raise ConfigError for what is no number of workers."""
        worker_range(self.num_workers)

    @property
    def worker_range(self) -> tuple[int, int]:
        """Least and most workers; (0, 0) leaves the number to the cluster."""
        return worker_range(self.num_workers)


@dataclass(frozen=True, kw_only=True)
class PoolConfig(Component):
    """Actors of each group of encoders."""

    section = "pool"
    title = "Cluster"

    pools: dict[str, dict[str, float]] | None = None
    """Encode the groups side by side: for each its actors, e.g. {"vae": {"num_gpus": 0.3, "batch_size": 4}}; the keys
    are num_gpus, num_cpus, batch_size, min_size and max_size."""
    pool_labels: dict[str, dict[str, str]] | None = option(None, identity=False)
    """Machines of each group, by labels that add to node_labels, e.g. {"text_encoder": {"stage": "text"}}."""

    def check(self) -> None:
        """Raise ConfigError for a pool that cannot be."""
        for group, labels in (self.pool_labels or {}).items():
            check_labels(f"pool_labels: {group}", labels)
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


def check_labels(option_name: str, labels: Mapping[str, str] | None) -> None:
    """Raise ConfigError, which begins with `option_name`, for what Ray would not take for labels and conditions."""
    for label, condition in (labels or {}).items():
        if _LABEL.fullmatch(label) is None:
            raise ConfigError(f"{option_name}: {label!r} is no name of a label; write it like stage or a.org/stage")
        if _CONDITION.fullmatch(condition) is None:
            raise ConfigError(
                f"{option_name}: {label}={condition!r} is no condition; write a value, !value, in(a,b) or !in(a,b)"
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
