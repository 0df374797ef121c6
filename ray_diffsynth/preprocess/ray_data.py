"""One pass of Ray Data over shards: decode tasks, a pool of actors, write tasks."""

import threading
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from ray_diffsynth.cluster.encoders import EncoderPool
from ray_diffsynth.cluster.environment import CallableActor, Environment, Parcel
from ray_diffsynth.preprocess.datasink import ShardSink
from ray_diffsynth.preprocess.decode import Decoder
from ray_diffsynth.preprocess.decode_passes import DecodePass
from ray_diffsynth.preprocess.encoder import Encoder
from ray_diffsynth.preprocess.messages import EncoderSpec, shard_row
from ray_diffsynth.preprocess.ray_errors import PassCallback, Reports

NO_PROGRESS_SECONDS = 24 * 3600.0
"""Ray Data gives up a pass in which nothing moves for so long; by default half an hour, in which no GPU may be free."""


@dataclass(frozen=True)
class PassContext:
    """What a pass needs beside its shards. It ends with `Stopped` soon after `stop` is set."""

    spec: EncoderSpec
    size: EncoderPool
    cache: str
    codec: str
    monitor: Any
    stop: threading.Event
    environment: Environment | None = None


def run_pass(
    context: PassContext, decoded_together: DecodePass, *, retries: int, in_flight: int
) -> tuple[list[dict[str, Any]], int]:
    """Encode and write the shards of a pass; the results (`ShardSink`) of those that came through, and the deaths.

    `retries`: how often a shard is tried again when its process died; then it is dropped. `in_flight`: shards that wait
    in or at an actor; with one, only the shard that is encoded is lost with it. Raises Stopped, EncoderError, and
    whatever Ray raises.
    """
    spec, size, monitor = context.spec, context.size, context.monitor
    environment, shards, tries = context.environment, decoded_together.shards, retries + 1
    sink = ShardSink(context.cache, spec.group.name, spec.group.parameters, context.codec, monitor, environment, tries)
    ray.get(monitor.report.remote("begin_pass"))
    # Rows of the dataset are whole shards, so a block never tears one apart.
    dataset = ray.data.from_items([shard_row(shard) for shard in shards], override_num_blocks=len(shards))
    options = dataset.context  # its own copy, which the steps below inherit
    options.enable_fallback_to_arrow_object_ext_type = False
    options.enable_progress_bars = False
    options.max_errored_blocks = -1  # counted by the caller: what is lost is tried again in smaller parts
    options.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    options.execution_options.verbose_progress = False
    # For every task and actor, and for what Ray Data asks the autoscaler for.
    options.execution_options.label_selector = dict(size.selector) or None
    options.custom_execution_callback_classes = [*options.custom_execution_callback_classes, PassCallback]
    decoded = dataset.map(
        Decoder(spec, monitor, environment, tries),
        num_cpus=size.decode_cpus,
        # What the headers say that decoding takes. The machine's memory is shared by these reservations alone: actors
        # and write tasks reserve none.
        memory=decoded_together.memory or None,
        compute=TaskPoolStrategy(decoded_together.tasks),
        max_retries=retries,
    )
    encoded = decoded.map(
        CallableActor,
        fn_constructor_args=(Parcel(environment, partial(Encoder, spec, monitor, tries)),),
        num_cpus=size.actor_cpus,
        num_gpus=size.actor_gpus or None,
        resources=dict(size.others) or None,
        compute=ActorPoolStrategy(
            min_size=min(size.min_actors, len(shards)),
            max_size=min(size.max_actors, len(shards)),
            max_tasks_in_flight_per_actor=in_flight,
        ),
        # Without a bound, since an actor that is out of restarts stays in its pool, where shards wait for it for ever.
        # What kills it each time ends all the same: a shard is dropped, and loading the models is given up.
        max_restarts=-1,
        max_task_retries=retries,
    )
    with Reports(context.stop) as reports:
        try:
            encoded.write_datasink(sink, ray_remote_args={"num_cpus": size.write_cpus, "max_retries": retries})
        finally:
            ray.get(monitor.end_encoders.remote())
    return sink.results, reports.deaths(spec.group.name)
