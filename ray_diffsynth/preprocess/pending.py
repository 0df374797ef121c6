"""What is still to be encoded: the wanted rows of each group without those that the cache holds, cut into shards."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.preprocess.catalog import committed_rows, committed_state, recover
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.records import Sample
from ray_diffsynth.preprocess.shards import not_known, plan_shards, wanted_rows


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
    run: GroupRun, committed: Committed, samples: Sequence[Sample], *, retry: bool, before: Sequence[GroupRun] = ()
) -> None:
    """Find the shards of a group that are still to be encoded, and what is known of its other rows.

    `retry`: rows that failed in an earlier run are tried again. before: groups that are done; no row is wanted of a
    sample that failed in one of them.
    """
    failing = [other for other in before if other.catalog.has_failures()]

    def alive() -> Iterable[tuple[Sample, str]]:
        for number, pair in enumerate(zip(samples, run.keys, strict=True)):
            if not any(other.failure(number) for other in failing):
                yield pair

    spec: SampleSpec = run.encoder.plan.sample
    run.catalog = committed_rows(committed.cache, committed.manifest, committed.index, run.name, retry=retry)
    wanted = not_known(wanted_rows(run.plan, alive(), spec, run.empty_key), run.catalog.known())
    run.shards = recover(committed.cache, run.name, plan_shards(wanted), run.catalog, retry=retry)
    locations = run.catalog.locations
    reused = {key for _, key in alive() if key in locations}
    run.reused = len(reused | ({run.empty_key} & locations.keys()))


def plan_turns(
    runs: Sequence[GroupRun], committed: Committed, samples: Sequence[Sample], *, side_by_side: bool, retry: bool
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
