"""The encoding itself: the shards of each group, until each row is written or known to be impossible."""

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from ray_diffsynth.cluster.encoders import EncoderPool
from ray_diffsynth.cluster.environment import Environment
from ray_diffsynth.cluster.joined import alive_nodes, joined_cluster
from ray_diffsynth.cluster.living import living
from ray_diffsynth.errors import first_line
from ray_diffsynth.preprocess.attempts import Unfinished
from ray_diffsynth.preprocess.decode_passes import DecodePass, plan_decoding
from ray_diffsynth.preprocess.errors import EncoderError, described
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.losses import RETRIES, Losses
from ray_diffsynth.preprocess.monitor import add_counts
from ray_diffsynth.preprocess.monitors import monitors_here, watch
from ray_diffsynth.preprocess.ray_data import PassContext, run_pass
from ray_diffsynth.preprocess.ray_errors import DEATHS, Stopped
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.shards import ShardPlan
from ray_diffsynth.progress import Progress
from ray_diffsynth.ray_compat import death_by_memory

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
    title = f"encode {runs[0].name}" if len(runs) == 1 else "encode"
    total = sum(run.rows for run in runs)
    with monitors_here(len(runs)) as monitors, Progress(title, total=total, unit="samples") as progress:
        contexts = [
            PassContext(run.encoder, pools[run.name], cache, codec, monitor, stop, environment)
            for run, monitor in zip(runs, monitors, strict=True)
        ]
        try:
            with watch(runs, monitors, stop, progress):
                if len(runs) == 1:
                    encode_group(runs[0], contexts[0])
                else:
                    _side_by_side(runs, contexts, stop)
        except DEATHS as error:
            raise EncoderError(
                f"the run lost a process that it needs, and Ray did not start it again: {first_line(error)}; the "
                "machine may lack memory (see Ray's logs); run again: what is written is kept"
            ) from error


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

    Those that take much memory to decode are encoded after the others, in passes of their own.
    What was lost with a machine is tried again as it was: the cache is then that of an undisturbed run, byte for byte.
    A shard whose process dies again and again is dropped by Ray Data. The batch that killed is then cut out of it, and
    cut in two until the row that kills its encoder stands alone, which is quarantined; the others are encoded.
    """
    losses = Losses(run.name)
    waiting = deque((each, RETRIES, 2) for each in _passes(run, context, run.shards))
    while waiting:
        # Two shards in flight overlap moving one with encoding the one before, but both are lost when an actor dies.
        # A part of a lost shard is not worth as many deaths (each costs loading the models): it is suspect already.
        decoded_together, retries, in_flight = waiting.popleft()
        lost = _encode_pass(run, context, losses, decoded_together, retries=retries, in_flight=in_flight)
        # What was lost comes before larger shards: what kills is known sooner.
        waiting.extendleft(reversed([(each, 1, 1) for each in _passes(run, context, lost)]))


def _passes(run: GroupRun, context: PassContext, shards: Sequence[ShardPlan]) -> Sequence[DecodePass]:
    """How the shards are decoded on the machines that are there; rows that none of them can decode are left out."""
    if not shards:
        return ()
    size = context.size
    nodes = list(joined_cluster().select(size.selector).staying.values())
    plan = plan_decoding(shards, nodes, cpus=size.decode_cpus, tasks=size.decode_tasks)
    if plan.too_large:
        run.catalog.transient.update(plan.too_large)  # another machine can: the next run tries again
        add_counts(context.monitor, 0, len(plan.too_large), 0)
        reason = next(iter(plan.too_large.values())).message
        logger.error("%s: %d samples are left out; of the first: %s", run.name, len(plan.too_large), reason)
    for each in plan.passes:
        if each.large:
            logger.warning(
                "%s: %d samples lie in files so large that fewer are decoded at a time: each task reserves %.2g GB",
                *(run.name, each.rows, each.memory / 1e9),
            )
    return plan.passes


def _encode_pass(
    run: GroupRun,
    context: PassContext,
    losses: Losses,
    decoded_together: DecodePass,
    *,
    retries: int,
    in_flight: int,
) -> list[ShardPlan]:
    """Encode a pass; returns what of its shards is to be tried again, as they were or in parts."""
    group, shards = run.name, decoded_together.shards
    nodes = set(alive_nodes())
    try:
        results, deaths = run_pass(context, decoded_together, retries=retries, in_flight=in_flight)
    except Exception as error:
        # The reason that a task reported is nearer to the cause than what Ray reports.
        raise_if_given_up(context.monitor, error)
        raise
    run.add_results(results)
    lost = run.missing(shards)
    if not lost:
        return []
    raise_if_given_up(context.monitor)
    found: list[tuple[Unfinished, ...]] = ray.get(context.monitor.unfinished.remote([shard.name for shard in lost]))
    # Ray tells of no death where it would try again for ever: `attempt_at` ended that.
    if not deaths and not any(found):
        raise EncoderError(
            f"Ray lost {len(lost)} of {len(shards)} shards of {group} without a word; see its logs, and run again: "
            "what is written is kept"
        )
    found = [_with_reasons(attempts) for attempts in found]
    nodes |= {item.attempt.node for attempts in found for item in attempts}
    alive = living(nodes)
    again: list[ShardPlan] = []
    for shard, attempts in zip(lost, found, strict=True):
        next_attempt = losses.next_attempt(shard, attempts, alive, retries=retries, node_lost=not nodes <= alive)
        if isinstance(next_attempt, Failure):
            run.catalog.failures[shard.keys[0]] = next_attempt
        else:
            again += next_attempt
    whole = {shard.name for shard in lost} & {shard.name for shard in again}
    logger.warning(
        "%s: %d rows were lost%s; %d of them are tried again as they were, the others in smaller parts",
        group,
        sum(len(shard.rows) for shard in lost),
        " with a machine or their process" if nodes - alive else " with their process",
        sum(len(shard.rows) for shard in lost if shard.name in whole),
    )
    return again


def _with_reasons(attempts: Sequence[Unfinished]) -> tuple[Unfinished, ...]:
    """The attempts, each with why its process died where that is known: from its last words, or from Ray."""
    return tuple(
        item if item.exit_reason else replace(item, exit_reason=death_by_memory(item.attempt.process))
        for item in attempts
    )


def raise_if_given_up(monitor: Any, cause: Exception | None = None) -> None:
    """Raise EncoderError with the reason that a task reported to the monitor, if one did."""
    if reason := ray.get(monitor.get.remote()).fatal:
        raise EncoderError(reason) from cause
