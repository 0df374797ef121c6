"""The encoding itself: the shards of each group, until each row is written or known to be impossible."""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from ray_diffsynth.cluster.encoders import EncoderPool
from ray_diffsynth.cluster.environment import Environment
from ray_diffsynth.cluster.joined import alive_nodes, on_this_node
from ray_diffsynth.cluster.living import living
from ray_diffsynth.preprocess.attempts import Unfinished
from ray_diffsynth.preprocess.errors import EncoderError, described
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.losses import RETRIES, Losses
from ray_diffsynth.preprocess.metrics import PoolMetrics
from ray_diffsynth.preprocess.monitor import Counts, Monitor
from ray_diffsynth.preprocess.ray_data import PassContext, run_pass
from ray_diffsynth.preprocess.ray_errors import Stopped
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.progress import Progress

logger = logging.getLogger(__name__)

STOP_SECONDS = 60.0
"""How long the other groups may take to end when one cannot go on."""


def encode_all(
    runs: Sequence[GroupRun],
    pools: Mapping[str, EncoderPool],
    *,
    cache: str,
    codec: str,
    environment: Environment | None = None,
) -> None:
    """Encode and write the shards of all groups side by side. Raises EncoderError, and whatever Ray raises.

    pools: what the actors and tasks of each group that has shards take.
    When one group cannot go on, the others are stopped too.
    """
    runs = [run for run in runs if run.shards]
    if not runs:
        return
    stop = threading.Event()
    monitors = [Monitor.options(scheduling_strategy=on_this_node()).remote() for _ in runs]  # type: ignore[attr-defined]
    contexts = [
        PassContext(run.encoder, pools[run.name], cache, codec, monitor, stop, environment)
        for run, monitor in zip(runs, monitors, strict=True)
    ]
    title = f"encode {runs[0].name}" if len(runs) == 1 else "encode"
    total = sum(run.rows for run in runs)
    try:
        with Progress(title, total=total, unit="samples") as progress, _watch(runs, monitors, stop, progress):
            if len(runs) == 1:
                encode_group(runs[0], contexts[0])
            else:
                _side_by_side(runs, contexts, stop)
    finally:
        for monitor in monitors:
            ray.kill(monitor)


def _side_by_side(runs: Sequence[GroupRun], contexts: Sequence[PassContext], stop: threading.Event) -> None:
    """A thread for each group. The first that cannot go on stops the others; its error is raised when they have ended.

    Another group's own error, if it had one too, is logged.
    """
    errors: list[tuple[str, BaseException]] = []

    def one(run: GroupRun, context: PassContext) -> None:
        try:
            encode_group(run, context)
        except BaseException as error:
            errors.append((run.name, error))
            stop.set()

    # Daemons, joined in small waits: an interrupt ends the run at once, not after the last shard.
    threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in zip(runs, contexts, strict=True)]
    for thread in threads:
        thread.start()
    try:
        while not stop.is_set() and any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(timeout=0.1)
    finally:
        if any(thread.is_alive() for thread in threads):
            stop.set()
        for thread in threads:
            thread.join(timeout=STOP_SECONDS)
    own = [(group, error) for group, error in errors if not isinstance(error, Stopped)]
    for group, error in own[1:]:
        logger.error("%s", described(error) if isinstance(error, EncoderError) else f"{group}: {described(error)}")
    for group, error in own or errors:
        if not isinstance(error, EncoderError):  # whose text names its group
            error.add_note(f"while the group {group} was encoded")
        raise error


def encode_group(run: GroupRun, context: PassContext) -> None:
    """Encode the shards of one group. Raises EncoderError, Stopped when another group cannot go on.

    What was lost with a machine is tried again as it was: the cache is then that of an undisturbed run, byte for byte.
    A shard whose process dies again and again is dropped by Ray Data. The batch that killed is then cut out of it, and
    cut in two until the row that kills its encoder stands alone, which is quarantined; the others are encoded.
    """
    group, shards = run.name, run.shards
    losses = Losses(group)
    first = True
    while shards:
        # Two shards in flight overlap moving one with encoding the one before, but both are lost when an actor dies.
        # A part of a lost shard is not worth as many deaths (each costs loading the models): it is suspect already.
        retries, in_flight = (RETRIES, 2) if first else (1, 1)
        first = False
        nodes = set(alive_nodes())
        try:
            results, deaths = run_pass(context, shards, retries=retries, in_flight=in_flight)
        except Exception as error:
            # The reason that a task reported is nearer to the cause than what Ray reports.
            raise_if_given_up(context.monitor, error)
            raise
        run.add_results(results)
        lost = run.missing(shards)
        if not lost:
            return
        raise_if_given_up(context.monitor)
        if not deaths:
            raise EncoderError(
                f"Ray lost {len(lost)} of {len(shards)} shards of {group} without a word; see its logs, and run again: "
                "what is written is kept"
            )
        found: list[tuple[Unfinished, ...]] = ray.get(context.monitor.unfinished.remote([shard.name for shard in lost]))
        nodes |= {item.attempt.node for attempts in found for item in attempts}
        alive = living(nodes)
        shards = []
        for shard, attempts in zip(lost, found, strict=True):
            again = losses.next_attempt(shard, attempts, alive, retries=retries, node_lost=not nodes <= alive)
            if isinstance(again, Failure):
                run.catalog.failures[shard.keys[0]] = again
            else:
                shards += again
        whole = {shard.name for shard in lost} & {shard.name for shard in shards}
        logger.warning(
            "%s: %d rows were lost%s; %d of them are tried again as they were, the others in smaller parts",
            group,
            sum(len(shard.rows) for shard in lost),
            " with a machine or their process" if nodes - alive else " with their process",
            sum(len(shard.rows) for shard in lost if shard.name in whole),
        )


def raise_if_given_up(monitor: Any, cause: Exception | None = None) -> None:
    """Raise EncoderError with the reason that a task reported to the monitor, if one did."""
    if reason := ray.get(monitor.get.remote()).fatal:
        raise EncoderError(reason) from cause


@contextmanager
def _watch(
    runs: Sequence[GroupRun], monitors: Sequence[Any], stop: threading.Event, progress: Progress
) -> Iterator[None]:
    """Within it, `progress` and Ray's metrics follow the monitors, and `stop` is set when one of them gives up."""
    over = threading.Event()
    metrics = [PoolMetrics(run.name, run.rows) for run in runs]

    def look() -> None:
        counts: list[Counts] = ray.get([monitor.get.remote() for monitor in monitors])
        if any(count.fatal for count in counts):
            stop.set()
        rates = [metric.update(count) for metric, count in zip(metrics, counts, strict=True)]
        values: dict[str, float | str] = {"quarantined": str(sum(count.failed for count in counts))}
        values["MB"] = f"{sum(count.nbytes for count in counts) / 1e6:.1f}"
        if len(runs) > 1:
            values |= {run.name: f"{rate:.3g}/s" for run, rate in zip(runs, rates, strict=True)}
        progress.update(sum(count.written + count.failed for count in counts), **values)

    def follow() -> None:
        while not over.wait(0.5):
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
        over.set()
        thread.join()
    look()
