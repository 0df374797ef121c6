"""The machines of a cluster as plain data, and how many processes they have room for."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field


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


def room(resources: Mapping[str, float], nodes: Mapping[str, Mapping[str, float]]) -> int:
    """How many processes of `resources` the nodes (id -> resources, all of them or what is free) have room for."""
    wanted = {name: amount for name, amount in resources.items() if amount > 0}
    if not wanted:
        return sys.maxsize
    return sum(
        min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items())
        for node in nodes.values()
    )
