"""What is to be encoded: the wanted rows of each group without those that the cache holds, cut into shards."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.preprocess.cache_keys import GroupPlan
from ray_diffsynth.preprocess.catalog import GroupCatalog, committed_rows, recover
from ray_diffsynth.preprocess.execute import Work
from ray_diffsynth.preprocess.pool import PoolSize
from ray_diffsynth.preprocess.records import Sample
from ray_diffsynth.preprocess.shards import ShardPlan, not_known, plan_shards, wanted_rows

if TYPE_CHECKING:
    from ray_diffsynth.preprocess.job import Job


@dataclass(frozen=True)
class Committed:
    """What the cache holds before this run; no manifest and index where there is none yet."""

    cache: str
    manifest: Manifest | None
    index: pa.Table | None


def open_shards(
    job: "Job", committed: Committed, group: GroupPlan, samples: Sequence[Sample]
) -> tuple[list[ShardPlan], GroupCatalog]:
    """The shards of `group` that are still to be encoded, and what is known of its rows."""
    retry = job.config.retry_quarantined
    catalog = committed_rows(committed.cache, committed.manifest, committed.index, group.name, retry=retry)
    wanted = not_known(wanted_rows(group, samples, job.sample), catalog.known())
    return recover(committed.cache, group.name, plan_shards(wanted), catalog, retry=retry), catalog


def plan_works(
    job: "Job", committed: Committed, samples: Sequence[Sample], sizes: Mapping[str, PoolSize]
) -> Iterator[list[Work]]:
    """The work of the groups that run at the same time: each group by itself, or all at once with `pools`.

    One group after another, a sample that failed in a group before goes to quarantine: no work for it in the next. The
    caller does the work before it asks for more.
    """

    def work(group: GroupPlan, wanted: Sequence[Sample]) -> Work:
        shards, catalog = open_shards(job, committed, group, wanted)
        size = sizes[group.name]
        rows = wanted_rows(group, wanted, job.sample)  # one at a time: of those that are to be encoded no key is kept
        reused = len({row.key for row in rows if row.key in catalog.locations})
        return Work(job.encoder(group, size.batch_size), size, shards, catalog, reused=reused)

    if job.config.pools is not None:
        yield [work(group, samples) for group in job.groups]
        return
    done: list[tuple[GroupPlan, GroupCatalog]] = []
    for group in job.groups:
        failing = [(g, c) for g, c in done if c.failures or c.transient]
        alive = [sample for sample in samples if not any(c.failure(g.key(sample.inputs)) for g, c in failing)]
        one = work(group, alive)
        done.append((group, one.catalog))
        yield [one]
