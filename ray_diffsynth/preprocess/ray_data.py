"""One pass of Ray Data over shards: decode tasks, a pool of actors, write tasks; and what Ray says of the dead."""

import logging
import threading
from collections.abc import Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)

from ray_diffsynth.errors import remote_cause
from ray_diffsynth.preprocess.datasink import ShardSink
from ray_diffsynth.preprocess.decode import Decoder
from ray_diffsynth.preprocess.encoder import Encoder
from ray_diffsynth.preprocess.messages import EncoderError, EncoderSpec, described, shard_row
from ray_diffsynth.preprocess.shards import ShardPlan
from ray_diffsynth.ray_compat import DATA_ERRORS_LOGGER
from ray_diffsynth.resources import EncoderPool

DEATHS = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError, LocalRayletDiedError, ObjectLostError)
"""How Ray reports that a process or a machine has died, and with it what it worked on."""
NO_PROGRESS_SECONDS = 24 * 3600.0
"""Ray Data gives up a pass in which nothing moves for so long; by default half an hour, in which no GPU may be free."""


class Stopped(Exception):
    """The pass was ended because another group, or a part of this one, cannot go on."""


class Reports(logging.Handler):
    """The errors of one pass that Ray Data logs and then ignores, since blocks may be lost; a context manager.

    Within it, an execution that this thread begins belongs to the pass: its thread logs to here and to no other pass,
    and ends with `Stopped` soon after `stop` is set.
    """

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(logging.ERROR)
        self.stop = stop
        self.threads: set[str] = set()
        self.errors: list[BaseException] = []
        self._token: Token[Reports | None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.threadName in self.threads and record.exc_info and record.exc_info[1] is not None:
            self.errors.append(record.exc_info[1])

    def __enter__(self) -> "Reports":
        self._token = _current.set(self)
        logging.getLogger(DATA_ERRORS_LOGGER).addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(DATA_ERRORS_LOGGER).removeHandler(self)
        if self._token is not None:
            _current.reset(self._token)

    def deaths(self, group: str) -> int:
        """How many processes died. Raises EncoderError for an error of another kind: it is no shard's fault."""
        for error in self.errors:
            if not isinstance(error, DEATHS):
                cause = remote_cause(error) or error  # a task's error holds a whole traceback as its text
                raise EncoderError(f"{group} could not be encoded: {described(cause)}") from error
        return len(self.errors)


_current: ContextVar[Reports | None] = ContextVar("reports", default=None)


class PassCallback:
    """Ray Data's callback, one for each execution: ties it to the pass whose thread began it."""

    def __init__(self) -> None:
        self.reports: Reports | None = None

    def before_execution_starts(self, executor: Any) -> None:
        self.reports = _current.get()
        if self.reports is not None:
            self.reports.threads.add(executor.name)  # a thread, named by its dataset

    def on_execution_step(self, executor: Any) -> None:
        if self.reports is not None and self.reports.stop.is_set():
            raise Stopped("stopped on request")

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


@dataclass(frozen=True)
class Pipeline:
    """What a pass needs beside its shards. It ends with `Stopped` soon after `stop` is set."""

    spec: EncoderSpec
    size: EncoderPool
    cache: str
    codec: str
    monitor: Any
    stop: threading.Event


def run_pass(
    line: Pipeline, shards: Sequence[ShardPlan], *, retries: int, in_flight: int
) -> tuple[list[dict[str, Any]], int]:
    """Encode and write the shards; the results of `ShardSink` for those that came through, and how many processes died.

    `retries`: how often a shard is tried again when its process died; then it is dropped. `in_flight`: shards that wait
    in or at an actor; with one, only the shard that is encoded is lost with it. Raises Stopped, EncoderError, and
    whatever Ray raises.
    """
    spec, size, monitor = line.spec, line.size, line.monitor
    sink = ShardSink(line.cache, spec.group, spec.parameters, line.codec, monitor)
    # Rows of the dataset are whole shards, so a block never tears one apart.
    dataset = ray.data.from_items([shard_row(shard) for shard in shards], override_num_blocks=len(shards))
    context = dataset.context  # its own copy, which the steps below inherit
    context.enable_fallback_to_arrow_object_ext_type = False
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # counted by the caller: what is lost is tried again in smaller parts
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    context.execution_options.verbose_progress = False
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, PassCallback]
    decoded = dataset.map(
        Decoder(spec, monitor),
        num_cpus=size.decode_cpus,
        compute=TaskPoolStrategy(size.decode_tasks),
        max_retries=retries,
    )
    encoded = decoded.map(
        Encoder,
        fn_constructor_args=(spec, monitor),
        num_cpus=size.actor_cpus,
        num_gpus=size.actor_gpus or None,
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
    with Reports(line.stop) as reports:
        try:
            encoded.write_datasink(sink, ray_remote_args={"num_cpus": size.write_cpus, "max_retries": retries})
        finally:
            ray.get(monitor.end_encoders.remote())
    return sink.results, reports.deaths(spec.group)
