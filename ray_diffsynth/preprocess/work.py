"""The encoding itself: the shards of each group through decode tasks, actors and write tasks of Ray Data."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_diffsynth.errors import UserError
from ray_diffsynth.preprocess.catalog import GroupCatalog
from ray_diffsynth.preprocess.datasink import Counter, Counts, ShardSink
from ray_diffsynth.preprocess.encoder import Decoder, Encoder, EncoderSpec, shard_row
from ray_diffsynth.preprocess.metrics import PoolMetrics
from ray_diffsynth.preprocess.pool import PoolSize
from ray_diffsynth.preprocess.shards import ShardPlan, single_rows
from ray_diffsynth.progress import Progress

logger = logging.getLogger(__name__)

RETRIES = 2
"""How often a decode task or an encoder's call is tried again when its process died."""


class EncoderError(UserError):
    """The units of a group cannot run at all (a missing model or input), so no sample is to blame."""


@dataclass
class Work:
    """One group's shards that are to be encoded. What is written goes to `catalog`; `encoded` counts those rows."""

    spec: EncoderSpec
    size: PoolSize
    shards: Sequence[ShardPlan]
    catalog: GroupCatalog
    encoded: int = 0

    @property
    def rows(self) -> int:
        return sum(len(shard.rows) for shard in self.shards)


def encode_all(works: Sequence[Work], *, cache: str, codec: str) -> None:
    """Encode and write the shards of all groups side by side. Raises EncoderError, and whatever Ray raises.

    A shard whose actor dies again and again is dropped by Ray Data; its rows are then tried one by one, so that only
    the row that kills the encoder stays without a place in the catalog (and goes to quarantine).
    """
    works = [work for work in works if work.shards]
    if not works:
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    counters = [Counter.options(scheduling_strategy=here).remote() for _ in works]  # type: ignore[attr-defined]
    title = f"encode {works[0].spec.group}" if len(works) == 1 else "encode"
    total = sum(work.rows for work in works)
    with Progress(title, total=total, unit="samples") as progress, _watch(works, counters, progress):
        if len(works) == 1:
            _encode_group(works[0], cache, codec, counters[0])
        else:
            _side_by_side(works, cache, codec, counters)
    for counter in counters:
        ray.kill(counter)


def _side_by_side(works: Sequence[Work], cache: str, codec: str, counters: Sequence[Any]) -> None:
    """A thread for each group. The first error is raised at once; the job's end takes the other groups with it."""
    errors: list[BaseException] = []

    def one(work: Work, counter: Any) -> None:
        try:
            _encode_group(work, cache, codec, counter)
        except BaseException as error:
            errors.append(error)

    # Daemons, joined in small waits: an interrupt ends the job at once, not after the last shard.
    threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in zip(works, counters, strict=True)]
    for thread in threads:
        thread.start()
    while not errors and any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(timeout=0.1)
    if errors:
        raise errors[0]


def _encode_group(work: Work, cache: str, codec: str, counter: Any) -> None:
    _encode(work, work.shards, cache, codec, counter, restarts=4)
    lost = [row for shard in work.shards for row in single_rows(shard) if row.keys[0] not in work.catalog.known()]
    if not lost:
        return
    if not ray.get(counter.get.remote()).encoders:
        raise EncoderError(
            f"the encoder of {work.spec.group} died each time while it loaded its models; the machine may lack memory "
            "for them (see Ray's logs, or run with --verbose), or lower the number of actors"
        )
    logger.warning("%s: %d rows were lost with their encoder; trying them one by one", work.spec.group, len(lost))
    # Enough restarts for every row to be the one that kills.
    _encode(work, lost, cache, codec, counter, restarts=4 + (RETRIES + 1) * len(lost))


def _encode(work: Work, shards: Sequence[ShardPlan], cache: str, codec: str, counter: Any, *, restarts: int) -> None:
    """One pass of Ray Data over the shards. Rows of its dataset are whole shards, so a block never tears one apart."""
    spec, size = work.spec, work.size
    context = ray.data.DataContext.get_current()
    context.enable_fallback_to_arrow_object_ext_type = False
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # counted by the caller: what is lost is tried again row by row
    context.execution_options.verbose_progress = False
    sink = ShardSink(cache, spec.group, spec.parameters, codec, counter)
    dataset = ray.data.from_items([shard_row(shard) for shard in shards], override_num_blocks=len(shards))
    decoded = dataset.map(
        Decoder(spec), num_cpus=size.decode_cpus, compute=TaskPoolStrategy(size.decode_tasks), max_retries=RETRIES
    )
    encoded = decoded.map(
        Encoder,
        fn_constructor_args=(spec, counter),
        num_cpus=size.actor_cpus,
        num_gpus=size.actor_gpus or None,
        # Two tasks in flight overlap moving one shard with encoding the one before; the calls themselves stay serial.
        compute=ActorPoolStrategy(
            min_size=min(size.min_actors, len(shards)),
            max_size=min(size.max_actors, len(shards)),
            max_tasks_in_flight_per_actor=2,
        ),
        # Ray Data's default is to restart for ever, which a picture that kills its decoder would make endless.
        max_restarts=restarts,
        max_task_retries=RETRIES,
    )
    try:
        encoded.write_datasink(sink, ray_remote_args={"num_cpus": size.write_cpus})
    finally:
        ray.get(counter.end_encoders.remote())
    for shard in sink.shards:
        work.catalog.add(shard)
        work.encoded += len(shard.keys)
    if sink.fatal:
        raise EncoderError(f"{spec.group} could not be encoded: {sink.fatal[0]}")


@contextmanager
def _watch(works: Sequence[Work], counters: Sequence[Any], progress: Progress) -> Iterator[None]:
    """Within it, `progress` and Ray's metrics follow the counters."""
    stop = threading.Event()
    metrics = [PoolMetrics(work.spec.group, work.rows) for work in works]

    def look() -> None:
        counts: list[Counts] = ray.get([counter.get.remote() for counter in counters])
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
