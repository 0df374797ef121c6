"""What a job wants of a cluster: how many processes of which kind, on which machines. Plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ray_diffsynth.cluster.labels import described
from ray_diffsynth.cluster.nodes import Cluster, Process, pack, room


@dataclass(frozen=True)
class Ask:
    """So many processes of one kind.

    what: they are, in the plural, for messages. process: what one reserves, and where. least: as many must have room
    before the job starts. most: as many are asked for.
    """

    what: str
    process: Process
    least: int
    most: int

    def __str__(self) -> str:
        """`2 to 4 encoding actors of 1 GPU, 0.5 CPU with stage=encode`"""
        number = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"{number} {self.what} of {amounts(self.process.resources)}{described(self.process.selector)}"


@dataclass(frozen=True)
class Demand:
    """All that a job, or a part of it, wants at the same time."""

    asks: tuple[Ask, ...] = ()

    def bundles(self) -> list[dict[str, float]]:
        """The most that is wanted, a bundle of resources for each process, as Ray's autoscaler takes it."""
        return [ask.process.reserved for ask in self.asks for _ in range(ask.most)]

    def selectors(self) -> list[dict[str, str]]:
        """The selector of each bundle."""
        return [dict(ask.process.selector) for ask in self.asks for _ in range(ask.most)]

    def missing(self, cluster: Cluster) -> list[tuple[Ask, int]]:
        """The kinds of which not even the least has room, and how many of them have; the largest are put first."""
        order = sorted(self.asks, key=lambda ask: _size(ask.process), reverse=True)
        placed = iter(pack([ask.process for ask in order for _ in range(ask.least)], cluster))
        counts = {id(ask): sum(next(placed) for _ in range(ask.least)) for ask in order}
        return [(ask, counts[id(ask)]) for ask in self.asks if counts[id(ask)] < ask.least]

    def reduced(self, share: float) -> Demand:
        """The least of each kind, and this share (0 to 1) of what is wanted beyond it; all of that at least."""
        numbers = [ask.least + math.ceil((ask.most - ask.least) * share) for ask in self.asks]
        return Demand(tuple(replace(ask, least=n, most=n) for ask, n in zip(self.asks, numbers, strict=True)))


@dataclass(frozen=True)
class Shortage:
    """Why a job cannot start now. wanted: a kind of process, and how many of these have room. busy: others hold it."""

    wanted: Sequence[tuple[Ask, int]]
    cluster: Cluster
    free: Cluster
    starting: Sequence[str] = field(default=())
    failed: Sequence[str] = field(default=())

    @property
    def busy(self) -> bool:
        """Whether the machines are there and something else has them."""
        return not Demand(tuple(ask for ask, _ in self.wanted)).missing(self.cluster)

    def __str__(self) -> str:
        parts = []
        for ask, fitting in self.wanted:
            there = self.cluster.select(ask.process.selector)
            free = self.free.select(ask.process.selector)
            held = room(ask.process.resources, there.staying) - room(ask.process.resources, free.staying)
            left = ", ".join(f"{free.total(name):g} of {there.total(name):g} {name}" for name in ask.process.reserved)
            parts.append(
                f"{ask}: {fitting} would fit; "
                + (f"free are {left} on {there.machines} machines" if there.machines else "there is no such machine")
                + (", others hold the rest" if held > 0 else "")
            )
        if self.starting:
            parts.append(f"starting: {', '.join(self.starting)}")
        if self.failed:
            parts.append(f"could not be started: {', '.join(self.failed)}")
        return "; ".join(parts)


def amounts(resources: Mapping[str, float]) -> str:
    """`1 GPU, 0.5 CPU`"""
    found = sorted(Process(resources).reserved.items(), reverse=True)
    return ", ".join(f"{amount:g} {name}" for name, amount in found) or "nothing"


def _size(process: Process) -> tuple[float, float, float]:
    resources = process.resources
    return resources.get("GPU", 0.0), sum(resources.values()), resources.get("CPU", 0.0)
