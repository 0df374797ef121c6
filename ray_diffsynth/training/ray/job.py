"""Training on a Ray cluster: the loop in the workers of a TorchTrainer, going on after crashes from our checkpoints.

The checkpoints in the output path are the truth. Ray Train starts the workers and the process group; when they die, the
next attempt begins at the newest checkpoint, and so does the same command run again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch

from ray_diffsynth.cache.lease import Lease
from ray_diffsynth.cluster.environment import Environment, Parcel
from ray_diffsynth.cluster.holder import has_ended, own_place
from ray_diffsynth.cluster.joined import joined_cluster, on_this_node
from ray_diffsynth.cluster.request import Requester, requester
from ray_diffsynth.cluster.session import ray_session
from ray_diffsynth.cluster.workers import WorkerGroup, check_sampler, sampler_process, worker_group
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.errors import UserError, first_line, worker_failures
from ray_diffsynth.plan.run_plan import RunPlan, TrainPlan
from ray_diffsynth.ray_compat import autoscaler, no_placement_group_stays
from ray_diffsynth.storage import join
from ray_diffsynth.training import local
from ray_diffsynth.training.checkpoint import (
    CheckpointError,
    checkpoints_folder,
    list_checkpoints,
    read_state,
)
from ray_diffsynth.training.data.opening import check_data
from ray_diffsynth.training.identity import check_chosen
from ray_diffsynth.training.ray.checks import absolute_paths, check_files
from ray_diffsynth.training.ray.elastic import Watch, ask_for_more, wait_for_room
from ray_diffsynth.training.ray.failure import WorkerError, is_lost_connection, reason
from ray_diffsynth.training.ray.fit import fit
from ray_diffsynth.training.ray.sampler import Sampling
from ray_diffsynth.training.ray.worker import POLL_SECONDS, Collector, RayRuntime, messages_to_driver
from ray_diffsynth.training.report.metrics_log import TrainingProgress
from ray_diffsynth.training.report.sample_prompts import SamplePrompt, plan_samples
from ray_diffsynth.training.report.summary import write_training_report
from ray_diffsynth.training.result import TrainResult, merged
from ray_diffsynth.training.start import Start
from ray_diffsynth.training.trainer import train

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failures in a row without a new checkpoint between them, after which a run gives up; nodes taken away are none."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a run that SIGTERM ended before its last step: the same command goes on."""


def run(config: TrainConfig) -> dict[str, Any]:
    """Train as configured; returns what report.json holds. Under torchrun it trains in that process, without Ray.

    SIGTERM lets the workers save a checkpoint; then SystemExit(143).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return local.run(config)
    started = time.monotonic()
    config = absolute_paths(config)
    plan = RunPlan.resolve(config)  # every error of configuration comes here, before Ray starts
    samples = plan_samples(plan)
    start = _start_of(plan)
    check_files(config, going_on=start.goes_on or start.chosen is not None)
    check_data(plan)
    with Lease(plan.output_path) as held:
        return _train(plan, samples, held, started)


def _start_of(plan: TrainPlan) -> Start:
    """How the run begins. Raises CheckpointError where it cannot."""
    start = Start.of(plan.config)
    if start.chosen is not None:
        check_chosen(plan, start.chosen, start.resume)
    return start


def _train(plan: TrainPlan, samples: list[SamplePrompt], held: Lease, started: float) -> dict[str, Any]:
    """As `run`, once all that can be checked before Ray starts is."""
    config = plan.config
    # In this order: Ray sets a handler of its own when it starts.
    with (
        ray_session(config.ray_address, verbose=config.verbose, env=config.env_names) as environment,
        sigterm() as terminated,
        requester(f"train {config.output_path}") as wanted,
    ):
        held.acquire(own_place(), has_ended)
        _start_of(plan).begin()  # as it is now: another run may have had the path until this one took it
        plan = replace(plan, config=replace(config, resume="auto"))
        growing = autoscaler() is not None
        group = worker_group(config, joined_cluster(), _virtual_ranks(config.output_path), growing=growing)
        if samples and config.sample_resources is not None and not growing:
            cluster = joined_cluster()
            if (drawing := sampler_process(config, group, cluster)) is not None:
                check_sampler(drawing, group, cluster)
        result, workers = _fit_until_done(plan, group, samples, wanted, terminated, environment)
    held.check()
    report = write_training_report(plan.config, result, workers=workers, seconds=time.monotonic() - started)
    if terminated.is_set() and not result.finished:
        raise SystemExit(TERMINATED)
    return report


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets while the block runs; only in the main thread, elsewhere nothing sets it."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _virtual_ranks(output_path: str) -> int | None:
    """Virtual ranks of the run that is gone on with; None for a new one."""
    for name in reversed(list_checkpoints(output_path)):
        try:
            return int(read_state(join(checkpoints_folder(output_path), name))["position"]["lanes"])
        except CheckpointError:
            continue  # the loop names it when it passes it over
    return None


def _fit_until_done(
    plan: TrainPlan,
    group: WorkerGroup,
    samples: list[SamplePrompt],
    wanted: Requester,
    terminated: threading.Event,
    environment: Environment | None = None,
) -> tuple[TrainResult, int]:
    """Train, with another group of workers whenever one is lost or another number fits; also the last group's size.

    wanted: by which the autoscaler is asked, if there is one, for what Ray Train does not ask for itself.
    """
    collector = Collector.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    sampling = Sampling(plan, samples, collector, environment)
    failures, workers, results = 0, group.most, list[TrainResult]()
    with _progress_bar(collector):
        while not terminated.is_set():
            workers = wait_for_room(
                *(group, wanted, terminated.is_set),
                minutes=plan.config.wait_minutes,
                beside=sampling.beside(group),
                placed=sampling.placed,
                ask=bool(failures or results),
            )
            if not workers:
                break
            if sampling.begin(group, terminated.is_set):
                continue
            arguments = {
                "plan": plan,
                "collector": collector,
                "sampler": sampling.actor,
                "samples": sampling.of_workers,
                "folder": os.getcwd(),
            }
            asking = partial(ask_for_more, group, wanted, workers, sampling.placed)
            before = list_checkpoints(plan.output_path)
            ray.get(collector.begin.remote())
            with Watch(collector, group, workers, terminated) as watch:
                try:
                    with no_placement_group_stays():
                        fit(_worker, arguments, group, workers, environment, asking)
                except ray.train.TrainingFailedError as error:
                    if (told := reason(worker_failures(error))) is not None:
                        raise told from error
                    taken = watch.lost_to_notice()
                    if not taken:
                        failures = failures + 1 if list_checkpoints(plan.output_path) == before else 1
                    if failures >= MAX_FAILURES:
                        raise
                    what = "the node of a worker was taken away" if taken else "a worker was lost"
                    logger.warning("%s (%s); going on from the newest checkpoint", what, first_line(error))
                    continue
            failures = 0
            results.append(TrainResult(**ray.get(collector.result.remote())))
            if results[-1].finished or watch.regroup is None:
                break
            logger.warning("%s: going on from step %d", watch.regroup, results[-1].steps)
        sampling.end(finished=bool(results) and results[-1].finished)
        of_prompts: list[list[str]] = ray.get(collector.warnings.remote())
    ray.kill(collector)
    if not results:
        raise SystemExit(TERMINATED)  # asked to end before there was anything to report
    result = merged(results)
    return replace(result, warnings=[*result.warnings, *of_prompts]), workers


def _worker(config: dict[str, Parcel]) -> None:
    """What each Ray Train worker runs."""
    try:
        arguments: dict[str, Any] = config["arguments"].value
    except (UserError, ray.exceptions.RayError):
        raise
    except Exception as error:  # a module of the user's own, say, that this machine lacks
        context = ray.train.get_context()
        raise WorkerError.of(error, context.get_world_rank(), context.get_world_size()) from None
    if os.path.isdir(arguments["folder"]):  # relative paths inside options mean the driver's folder
        os.chdir(arguments["folder"])
    node = ray.get_runtime_context().get_node_id()
    ray.get(arguments["collector"].worker_begins.remote(node))
    runtime = RayRuntime(arguments["collector"], arguments["sampler"], arguments["samples"])
    try:
        with messages_to_driver(runtime):
            result = train(arguments["plan"], runtime)
    except (UserError, ray.exceptions.RayError):
        raise
    except Exception as error:
        if runtime.world_size > 1 and is_lost_connection(error):
            raise
        raise WorkerError.of(error, runtime.world_rank, runtime.world_size) from None
    if runtime.world_rank == 0:
        runtime.send_metrics()
        if result.finished:
            runtime.wait_for_samples()
        ray.get(runtime.collector.finish.remote(result.to_dict()))


@contextmanager
def _progress_bar(collector: Any) -> Iterator[None]:
    """A progress line from what `collector` gets, while the block runs."""
    progress, ended = TrainingProgress(), threading.Event()

    def update() -> None:
        over = False
        while not over:
            over = ended.wait(POLL_SECONDS)
            metrics, messages = ray.get(collector.take.remote())
            if metrics is not None:
                progress.update(metrics)
            for message, level in messages:
                logger.log(level, "%s", message)

    thread = threading.Thread(target=update, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        progress.close()
