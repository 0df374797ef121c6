"""The machines of a cluster as plain data, and how many processes they have room for."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray_diffsynth.cluster.labels import Selector, matches

_ROUNDING = 1e-6
"""Shares of a GPU are decimal fractions: three of 0.333333 fit it, and 1 / 0.1 is 10."""


@dataclass(frozen=True)
class Cluster:
    """The machines of a cluster that are alive.

    nodes: id -> its Ray resources, `CPU` and `GPU` among them. leaving: ids of those that are being taken away.
    labels: id -> its labels.
    """

    nodes: Mapping[str, Mapping[str, float]]
    leaving: frozenset[str] = frozenset()
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def select(self, selector: Selector) -> "Cluster":
        """The machines that a selector means."""
        if not selector:
            return self
        nodes = {node: found for node, found in self.nodes.items() if matches(self.labels.get(node, {}), selector)}
        return replace(self, nodes=nodes)

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


def room(resources: Mapping[str, float], nodes: Mapping[str, Mapping[str, float]]) -> int:
    """How many processes of `resources` the nodes (id -> resources, all of them or what is free) have room for.

    A part of a GPU is of one device: 2 GPUs have room for two processes of 0.6, not three.
    """
    wanted = Process(resources).reserved
    if not wanted:
        return sys.maxsize
    return sum(
        min(_times(name, node.get(name, 0.0), amount) for name, amount in wanted.items()) for node in nodes.values()
    )


def _times(name: str, there: float, amount: float) -> int:
    """How often `amount` is in what is there of a resource."""
    if name != "GPU" or amount >= 1:
        return math.floor(there / amount + _ROUNDING)
    devices = math.floor(there + _ROUNDING)
    return devices * math.floor(1 / amount + _ROUNDING) + math.floor((there - devices) / amount + _ROUNDING)


@dataclass(frozen=True)
class Process:
    """What one actor, worker or task reserves, and the labels of the machines on which it may be."""

    resources: Mapping[str, float]
    selector: Selector = field(default_factory=dict)

    @property
    def reserved(self) -> dict[str, float]:
        """The resources of which it takes some."""
        return {name: amount for name, amount in self.resources.items() if amount > 0}

    @property
    def ray_options(self) -> dict[str, Any]:
        """What `ray.remote` and `.options` of a task or an actor take."""
        others = {name: amount for name, amount in self.resources.items() if name not in ("CPU", "GPU")}
        return {
            "num_cpus": self.resources.get("CPU", 0.0),
            "num_gpus": self.resources.get("GPU", 0.0),
            "resources": others or None,
            "label_selector": dict(self.selector) or None,
        }


def pack(processes: Sequence[Process], cluster: Cluster) -> list[bool]:
    """For each process, whether it has room beside all that had room before it; no two share a CPU or part of a GPU.

    In the order given; each is put where it leaves the least of a GPU, as Ray packs them.
    """
    machines = {node: _Machine.of(resources) for node, resources in cluster.staying.items()}
    fits = []
    for process in processes:
        open_to = [m for node, m in machines.items() if matches(cluster.labels.get(node, {}), process.selector)]
        room_in = [machine for machine in open_to if machine.has_room(process.resources)]
        fits.append(bool(room_in))
        if room_in:
            min(room_in, key=lambda machine: machine.left_over(process.resources)).take(process.resources)
    return fits


@dataclass
class _Machine:
    """What is left of a machine. gpus: of each device."""

    others: dict[str, float]
    gpus: list[float]

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> "_Machine":
        gpus = resources.get("GPU", 0.0)
        whole = math.floor(gpus + _ROUNDING)
        parts = [gpus - whole] if gpus - whole > _ROUNDING else []
        return cls({name: amount for name, amount in resources.items() if name != "GPU"}, [1.0] * whole + parts)

    def _devices(self, gpu: float) -> list[int]:
        """Numbers of the devices that would be taken; empty if there is no room."""
        by_rest = sorted(range(len(self.gpus)), key=lambda number: self.gpus[number])
        if gpu < 1:
            return [number for number in by_rest if self.gpus[number] >= gpu - _ROUNDING][:1]
        whole = [number for number in by_rest if self.gpus[number] >= 1 - _ROUNDING][: round(gpu)]
        return whole if len(whole) == round(gpu) else []

    def has_room(self, resources: Mapping[str, float]) -> bool:
        gpu = resources.get("GPU", 0.0)
        return (gpu <= 0 or bool(self._devices(gpu))) and all(
            self.others.get(name, 0.0) >= amount - _ROUNDING for name, amount in resources.items() if name != "GPU"
        )

    def left_over(self, resources: Mapping[str, float]) -> tuple[float, float]:
        """Smaller where the process fits more closely: GPUs of which it needs none are the last to be taken."""
        gpu = resources.get("GPU", 0.0)
        rest = sum(self.gpus[number] for number in self._devices(gpu)) - gpu if gpu > 0 else float(len(self.gpus))
        return rest, sum(self.gpus)

    def take(self, resources: Mapping[str, float]) -> None:
        gpu = resources.get("GPU", 0.0)
        for number in self._devices(gpu) if gpu > 0 else ():
            self.gpus[number] -= min(gpu, 1.0)
        for name, amount in resources.items():
            if name != "GPU" and amount > 0:
                self.others[name] = self.others.get(name, 0.0) - amount
