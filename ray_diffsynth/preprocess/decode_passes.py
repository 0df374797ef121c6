"""Which shards are decoded side by side, by the memory that it takes: pure functions.

All decode tasks of a pass of Ray Data reserve the same, so shards that take much have a pass of their own: one large
image neither ends a machine beside other tasks, nor makes these reserve as much as it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ray_diffsynth.data.decode_memory import sent_bytes
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.shards import ShardPlan, halves, split

MEMORY_SHARE = 0.5
"""Part of a machine's memory for all the decode tasks that its CPUs have room for: encoders need some too."""
STORE_SHARE = 0.5
"""Part of the object stores for decoded shards that wait for an encoder; Ray spills to the disk what is above."""
FAR_LARGER = 4
"""Large shards that take less than the largest by this factor are not decoded as few at a time as that."""
STEP = 64 * 2**20
"""Bytes to whose multiples a reservation is rounded up: one that differs a little starts no other worker."""


@dataclass(frozen=True)
class DecodePass:
    """Shards whose decode tasks reserve `memory` bytes each (0: nothing) and run at most `tasks` at once.

    large: fewer than the CPUs have room for may be decoded at a time. tasks: None for as many as there is room for.
    """

    shards: tuple[ShardPlan, ...]
    memory: int = 0
    tasks: int | None = None
    large: bool = False

    @property
    def rows(self) -> int:
        return sum(len(shard.rows) for shard in self.shards)


@dataclass(frozen=True)
class DecodePlan:
    """Passes, the largest shards last, and the rows that no machine has the memory to decode, by key."""

    passes: tuple[DecodePass, ...]
    too_large: Mapping[str, Failure]


def plan_decoding(
    shards: Sequence[ShardPlan], nodes: Sequence[Mapping[str, float]], *, cpus: float, tasks: int | None
) -> DecodePlan:
    """At most three passes; one where decoding any of the shards takes no more than what belongs to a task's CPUs.

    nodes: the Ray resources of each machine on which they may be decoded. cpus: of a decode task. tasks: the most at
    once, if the user gave a number. A shard that takes more than the largest machine has is cut until its parts fit;
    shards that fit stay as they are, and so do the files that they become.
    """
    memories = [node["memory"] for node in nodes if node.get("memory")]
    if not memories:
        return DecodePlan((DecodePass(tuple(shards), tasks=tasks),) if shards else (), {})
    most = int(max(memories))
    too_large: dict[str, Failure] = {}
    fitting = [part for shard in shards for part in _fitting(shard, most, too_large)]
    ordinary = min(
        int(MEMORY_SHARE * node["memory"] * min(1.0, cpus / (node.get("CPU") or cpus or 1.0)))
        for node in nodes
        if node.get("memory")
    )
    needs = {shard.name: decode_bytes(shard) for shard in fitting}
    middle = max(needs.values(), default=0) // FAR_LARGER
    parts: tuple[list[ShardPlan], ...] = ([], [], [])
    for shard in fitting:
        need = needs[shard.name]
        parts[0 if need <= ordinary else 1 if need <= middle else 2].append(shard)
    stores = int(STORE_SHARE * sum(node.get("object_store_memory", 0.0) for node in nodes))
    slots = sum(int((node.get("CPU") or 0.0) / cpus) for node in nodes) if cpus else None
    passes = []
    for number, part in enumerate(parts):
        if part:
            need = max(needs[shard.name] for shard in part)
            sent = max(sum(sent_bytes(row.kept_bytes) for row in shard.rows) for shard in part)
            memory = min(STEP * math.ceil(need / STEP), most)
            passes.append(DecodePass(tuple(part), memory, _limit(tasks, sent, stores, slots), large=number > 0))
    return DecodePlan(tuple(passes), too_large)


def decode_bytes(shard: ShardPlan) -> int:
    """Memory that decoding a shard takes at its peak, by the headers: of one row, beside what stays of the others."""
    kept = sum(row.kept_bytes for row in shard.rows)
    return kept + max((row.decode_bytes - row.kept_bytes for row in shard.rows), default=0)


def _fitting(shard: ShardPlan, most: int, too_large: dict[str, Failure]) -> Iterator[ShardPlan]:
    """The shard, or parts of it that take at most `most` bytes; rows that take more by themselves go to `too_large`."""
    if decode_bytes(shard) <= most:
        yield shard
        return
    alone = {row.key: row.decode_bytes for row in shard.rows if row.decode_bytes > most}
    too_large |= {key: too_large_failure(need, most) for key, need in alone.items()}
    if len(alone) == len(shard.rows):
        return
    for part in split(shard, alone) or halves(shard):
        if not alone.keys() >= set(part.keys):
            yield from _fitting(part, most, too_large)


def too_large_failure(need: int, most: int) -> Failure:
    """Why a row is decoded on none of the machines: it takes `need` bytes, the largest has `most`."""
    return Failure(
        "TooLargeToDecode",
        f"it is too large to decode here: that takes {need / 1e9:.2g} GB, and the largest machine has {most / 1e9:.2g} "
        "GB for tasks; scale it down, or run again with a machine that has more memory",
    )


def _limit(tasks: int | None, sent: int, stores: int, slots: int | None) -> int | None:
    """The most tasks at once, so that what they hand over has room in the object stores."""
    if not sent or not stores:
        return tasks
    fitting = max(1, stores // sent)
    if slots is not None and fitting >= slots:
        return tasks  # the CPUs are the bound
    return fitting if tasks is None else min(tasks, fitting)
