"""What is still to be encoded: the wanted rows of each group without those that the cache holds, cut into shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.preprocess.catalog import committed_rows, committed_state, recover
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.key_columns import packed
from ray_diffsynth.preprocess.samples import Samples
from ray_diffsynth.preprocess.shard_plans import plan_shards


@dataclass(frozen=True)
class Committed:
    """What the cache holds before this run; no manifest and index where there is none yet."""

    cache: str
    manifest: Manifest | None
    index: pa.Table | None

    @classmethod
    def of(cls, cache: str) -> "Committed":
        """Raises CacheError where it is damaged."""
        return cls(cache, *committed_state(cache))


def plan_pending(
    run: GroupRun, committed: Committed, samples: Samples, *, retry: bool, before: Sequence[GroupRun] = ()
) -> None:
    """Find the shards of a group that are still to be encoded, and what is known of its other rows.

    `retry`: rows that failed in an earlier run are tried again. before: groups that are done; no row is wanted of a
    sample that failed in one of them.
    """
    alive = np.ones(len(samples), bool)
    for other in before:
        alive &= ~other.failed()
    run.catalog = committed_rows(committed.cache, committed.manifest, committed.index, run.name, retry=retry)
    wanted = alive & ~run.catalog.knows(run.keys)
    empty = run.empty_key
    if empty is not None and run.catalog.knows(packed([empty])).any():
        empty = None
    shards = plan_shards(run.plan, samples, run.keys, wanted, empty)
    run.shards = recover(committed.cache, run.name, shards, run.catalog, retry=retry)
    found = run.catalog.locations.find(run.keys[alive])
    reused = len(np.unique(found[found >= 0]))
    if run.empty_key is not None and run.empty_key in run.catalog.locations:
        reused += not (run.keys[alive] == packed([run.empty_key])).any()
    run.reused = reused


def plan_turns(
    runs: Sequence[GroupRun], committed: Committed, samples: Samples, *, side_by_side: bool, retry: bool
) -> Iterator[Sequence[GroupRun]]:
    """The groups that run at the same time, planned: all at once, or each by itself.

    One group after another, a sample that failed in a group before goes to quarantine and is not encoded in the next.
    The caller encodes what is yielded before it asks for more.
    """
    if side_by_side:
        for run in runs:
            plan_pending(run, committed, samples, retry=retry)
        yield runs
        return
    for number, run in enumerate(runs):
        plan_pending(run, committed, samples, retry=retry, before=runs[:number])
        yield [run]
