"""How much of the cluster one group's pipeline of tasks takes, and the pipeline itself."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from ray_diffsynth.errors import UserError
from ray_diffsynth.preprocess.catalog import GroupCatalog
from ray_diffsynth.preprocess.datasink import Counter, ShardSink
from ray_diffsynth.preprocess.encoder import Decoder, Encoder, EncoderSpec, shard_row
from ray_diffsynth.preprocess.shards import ShardPlan, single_rows
from ray_diffsynth.progress import Progress
from ray_diffsynth.ray_session import ClusterError, cluster_devices

logger = logging.getLogger(__name__)


class EncoderError(UserError):
    """The units of a group cannot run at all (a missing model or input), so no sample is to blame."""


@dataclass(frozen=True)
class PoolSize:
    """Actors of a group and what one of them, a decode task and a write task reserve."""

    actors: int
    actor_cpus: float
    actor_gpus: float
    decode_cpus: float
    decode_tasks: int | None
    write_cpus: float


def pool_size(num_workers: int, resources: dict[str, float] | None, decode_tasks: int) -> PoolSize:
    """Sizes for this cluster: an actor per GPU, or one per two CPUs, leaving room for decoding and writing beside them.

    Ray Data hangs when an actor, its decode task and a write task do not fit the CPUs, so what they reserve is fractional.
    """
    cpus, gpus = cluster_devices()
    wanted = dict(resources or {})
    gpu = wanted.pop("GPU", 1.0 if gpus >= 1 else 0.0)
    actors = num_workers or (max(1, int(gpus // gpu)) if gpu else max(1, int(cpus // 2)))
    cpu = wanted.pop("CPU", min(1.0, 0.5 * cpus / actors))
    if wanted:
        raise ClusterError(f"resources={sorted(wanted)} are not known; CPU and GPU are")
    if actors * gpu > gpus or actors * cpu >= cpus:
        raise ClusterError(
            f"{actors} actors of {cpu:g} CPU and {gpu:g} GPU do not fit a cluster of {cpus:g} CPU and {gpus:g} GPU "
            "beside their decode and write tasks; lower --num_workers or --resources"
        )
    rest = cpus - actors * cpu
    return PoolSize(actors, cpu, gpu, min(0.5, rest / 2), decode_tasks or None, min(0.25, rest / 4))


def encode_shards(
    shards: Sequence[ShardPlan], spec: EncoderSpec, size: PoolSize, *, cache: str, codec: str, catalog: GroupCatalog
) -> None:
    """Decode, encode and write the shards on the cluster, and take what was written into `catalog`.

    A shard whose actor dies again and again is dropped by Ray Data; its rows are then tried one by one, so that only the
    row that kills the encoder stays without a place in the catalog (and goes to quarantine).
    """
    if not shards:
        return
    total = sum(len(shard.rows) for shard in shards)
    counter = Counter.remote()  # type: ignore[attr-defined]
    with Progress(f"encode {spec.group}", total=total, unit="samples") as progress, _watch(counter, progress):
        _encode(shards, spec, size, cache, codec, catalog, counter)
        lost = [row for shard in shards for row in single_rows(shard) if row.keys[0] not in catalog.known()]
        if lost:
            logger.warning("%s: %d rows were lost with their encoder; trying them one by one", spec.group, len(lost))
            _encode(lost, spec, size, cache, codec, catalog, counter)
    ray.kill(counter)


def _encode(
    shards: Sequence[ShardPlan], spec: EncoderSpec, size: PoolSize, cache: str, codec: str, catalog: GroupCatalog, counter: Any
) -> None:
    """One pass of Ray Data over the shards. Rows of its dataset are whole shards, so a block never tears one apart."""
    context = ray.data.DataContext.get_current()
    context.enable_fallback_to_arrow_object_ext_type = False
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # counted below: what is lost is tried again row by row
    context.execution_options.verbose_progress = False
    sink = ShardSink(cache, spec.group, spec.parameters, codec, counter)
    dataset = ray.data.from_items([shard_row(shard) for shard in shards], override_num_blocks=len(shards))
    decoded = dataset.map(Decoder(spec), num_cpus=size.decode_cpus, compute=TaskPoolStrategy(size.decode_tasks))
    encoded = decoded.map(
        Encoder,
        fn_constructor_args=(spec,),
        num_cpus=size.actor_cpus,
        num_gpus=size.actor_gpus or None,
        # Two tasks in flight overlap moving one shard with encoding the one before; the calls themselves stay serial.
        compute=ActorPoolStrategy(size=min(size.actors, len(shards)), max_tasks_in_flight_per_actor=2),
        # Ray Data's default is to restart for ever, which a picture that kills its decoder would make endless.
        max_restarts=4,
        max_task_retries=2,
    )
    encoded.write_datasink(sink, ray_remote_args={"num_cpus": size.write_cpus})
    for shard in sink.shards:
        catalog.add(shard)
    if sink.fatal:
        raise EncoderError(f"{spec.group} could not be encoded: {sink.fatal[0]}")


@contextmanager
def _watch(counter: Any, progress: Progress) -> Iterator[None]:
    """Within it, `progress` follows `counter`."""
    stop = threading.Event()

    def follow() -> None:
        seen = 0
        while not stop.is_set():
            stop.wait(0.5)
            written, failed, nbytes = ray.get(counter.get.remote())
            progress.advance(written + failed - seen, quarantined=failed, MB=f"{nbytes / 1e6:.1f}")
            seen = written + failed

    thread = threading.Thread(target=follow, name="encode-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
