"""The encoding itself: the shards of each group, until each row is written or known to be impossible."""

import logging
import threading
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from ray_diffsynth.cache.store import Shard
from ray_diffsynth.preprocess.catalog import GroupCatalog
from ray_diffsynth.preprocess.counter import Counter, Counts, End
from ray_diffsynth.preprocess.handover import EncoderError, EncoderSpec
from ray_diffsynth.preprocess.metrics import PoolMetrics
from ray_diffsynth.preprocess.passes import STOP, Pipeline, Stopped, run_pass
from ray_diffsynth.preprocess.pool import PoolSize
from ray_diffsynth.preprocess.scan import Failure
from ray_diffsynth.preprocess.shards import ShardPlan, halves, split
from ray_diffsynth.progress import Progress
from ray_diffsynth.ray_session import alive_nodes, on_this_node

logger = logging.getLogger(__name__)

RETRIES = 2
"""How often a decode task or an encoder's call is tried again when its process died, before its shard is cut in two."""
STOP_SECONDS = 60.0
"""How long the other groups may take to end when one cannot go on."""


@dataclass
class Work:
    """One group's shards that are to be encoded. What is written goes to `catalog`; `encoded` counts those rows.

    `reused`: wanted rows that the cache held before.
    """

    spec: EncoderSpec
    size: PoolSize
    shards: Sequence[ShardPlan]
    catalog: GroupCatalog
    reused: int = 0
    encoded: int = field(default=0, init=False)

    @property
    def rows(self) -> int:
        return sum(len(shard.rows) for shard in self.shards)

    def take(self, results: Sequence[dict[str, Any]]) -> None:
        """Take in what a pass gave for its shards. Raises EncoderError if one of them says that nothing can be done."""
        for result in results:
            if "fatal" in result:
                raise EncoderError(result["fatal"])
            if result["shard"] is not None:
                shard = Shard.from_dict(result["shard"])
                self.catalog.add(shard)
                self.encoded += len(shard.keys)
            self.catalog.passed.update((kind, detail) for kind, detail in result["warnings"])
            for key, reason in result["passing"].items():
                self.catalog.passing[key] = Failure(*reason)

    def missing(self, shards: Sequence[ShardPlan]) -> list[ShardPlan]:
        """Those of the shards of which nothing is known: a shard is taken in as a whole or not at all."""
        done = {*self.catalog.known(), *self.catalog.passing}
        return [shard for shard in shards if not done.issuperset(shard.keys)]


def encode_all(works: Sequence[Work], *, cache: str, codec: str) -> None:
    """Encode and write the shards of all groups side by side. Raises EncoderError, and whatever Ray raises.

    When one group cannot go on, the others are stopped too.
    """
    works = [work for work in works if work.shards]
    if not works:
        return
    counters = [Counter.options(scheduling_strategy=on_this_node()).remote() for _ in works]  # type: ignore[attr-defined]
    lines = [
        Pipeline(work.spec, work.size, cache, codec, counter) for work, counter in zip(works, counters, strict=True)
    ]
    title = f"encode {works[0].spec.group}" if len(works) == 1 else "encode"
    total = sum(work.rows for work in works)
    STOP.clear()
    with Progress(title, total=total, unit="samples") as progress, _watch(works, counters, progress):
        if len(works) == 1:
            encode_group(works[0], lines[0])
        else:
            _side_by_side(works, lines)
    for counter in counters:
        ray.kill(counter)


def _side_by_side(works: Sequence[Work], lines: Sequence[Pipeline]) -> None:
    """A thread for each group; the first error stops all of them, and is raised when they have ended."""
    errors: list[BaseException] = []

    def one(work: Work, line: Pipeline) -> None:
        try:
            encode_group(work, line)
        except BaseException as error:
            errors.append(error)
            STOP.set()

    # Daemons, joined in small waits: an interrupt is heard at once, not after the last shard.
    threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in zip(works, lines, strict=True)]
    for thread in threads:
        thread.start()
    try:
        while not STOP.is_set() and any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(timeout=0.1)
    finally:
        if any(thread.is_alive() for thread in threads):
            STOP.set()
        for thread in threads:
            thread.join(timeout=STOP_SECONDS)
    if errors:
        raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])


def encode_group(work: Work, line: Pipeline) -> None:
    """Encode the shards of one group. Raises EncoderError, Stopped when another group cannot go on.

    What was lost with a machine is tried again as it was: the cache is then that of an undisturbed run, byte for byte.
    A shard whose process dies again and again is dropped by Ray Data. The batch that killed is then cut out of it, and
    cut in two until the row that kills its encoder stands alone, which is quarantined; the others are encoded.
    """
    shards: Sequence[ShardPlan] = work.shards
    tries: Tally[str] = Tally()
    first = True
    while shards:
        # Two shards in flight overlap moving one with encoding the one before, but both are lost when an actor dies.
        # A part of a lost shard is not worth as many deaths (each costs loading the models): it is suspect already.
        retries, in_flight = (RETRIES, 2) if first else (1, 1)
        machines = alive_nodes().keys()
        try:
            results, deaths = run_pass(line, shards, retries=retries, in_flight=in_flight)
        except Exception as error:
            # What a task or an actor said is nearer to the cause than how Ray reports its end.
            if not isinstance(error, EncoderError) and (reason := ray.get(line.counter.get.remote()).fatal):
                raise EncoderError(reason) from error
            raise
        work.take(results)
        lost = work.missing(shards)
        if not lost:
            return
        if not deaths:
            raise EncoderError(
                f"Ray lost {len(lost)} of {len(shards)} shards of {work.spec.group} without a word; see its logs, and "
                "run again: what is written is kept"
            )
        reached: list[End] = ray.get(line.counter.reached.remote([shard.name for shard in lost]))
        first = False
        rows = sum(len(shard.rows) for shard in lost)
        if machines - alive_nodes().keys():
            logger.warning("%s: %d rows were lost with a machine; trying them again", work.spec.group, rows)
            shards = lost
            continue
        logger.warning("%s: %d rows were lost with their process; trying them in smaller parts", work.spec.group, rows)
        shards = [part for shard, end in zip(lost, reached, strict=True) for part in _again(work, shard, end, tries)]


def _again(work: Work, shard: ShardPlan, end: End, tries: Tally[str]) -> list[ShardPlan]:
    """What is left to try of a lost shard that came so far; a single row that killed its process is a failure."""
    tries[shard.name] += 1
    if end.stage in (None, "decoded"):  # it waited for its turn while another one killed
        if tries[shard.name] > RETRIES:
            raise EncoderError(
                f"Ray lost a shard of {work.spec.group} {tries[shard.name]} times before it was its turn; see its "
                "logs, and run again: what is written is kept"
            )
        return [shard]
    if len(shard.rows) > 1:
        return split(shard, end.batch) or halves(shard)
    if end.stage == "encoded":
        raise EncoderError(
            f"the process that writes {work.spec.group} died each time; the machine may lack memory: see Ray's logs, "
            "and run again: what is written is kept"
        )
    why = f" ({end.words})" if end.words else ""
    work.catalog.failures[shard.keys[0]] = (
        Failure("DecoderDied", f"the decoding process died each time it reached this sample{why}")
        if end.stage == "decode"
        else Failure("EncoderDied", f"the encoding process died each time it reached this sample{why}")
    )
    return []


@contextmanager
def _watch(works: Sequence[Work], counters: Sequence[Any], progress: Progress) -> Iterator[None]:
    """Within it, `progress` and Ray's metrics follow the counters, and what cannot go on is stopped."""
    stop = threading.Event()
    metrics = [PoolMetrics(work.spec.group, work.rows) for work in works]

    def look() -> None:
        counts: list[Counts] = ray.get([counter.get.remote() for counter in counters])
        if any(count.fatal for count in counts):
            STOP.set()
        rates = [metric.update(count) for metric, count in zip(metrics, counts, strict=True)]
        values: dict[str, float | str] = {"quarantined": str(sum(count.failed for count in counts))}
        values["MB"] = f"{sum(count.nbytes for count in counts) / 1e6:.1f}"
        if len(works) > 1:
            values |= {work.spec.group: f"{rate:.3g}/s" for work, rate in zip(works, rates, strict=True)}
        progress.update(sum(count.written + count.failed for count in counts), **values)

    def follow() -> None:
        while not stop.wait(0.5):
            try:
                look()
            except ray.exceptions.RayError as error:
                logger.warning("the progress is not shown any more: %s", error)
                return

    thread = threading.Thread(target=follow, name="encode-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    look()
