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
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

from ray_diffsynth.cluster.session import joined_cluster, on_this_node, ray_session
from ray_diffsynth.cluster.workers import WorkerGroup, sampler_resources, worker_group
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.errors import UserError, first_line, worker_failures
from ray_diffsynth.models.lora_file import check_lora_file
from ray_diffsynth.plan.run_plan import RunPlan, TrainPlan
from ray_diffsynth.storage import absolute, join
from ray_diffsynth.training import local
from ray_diffsynth.training.checkpoint import (
    CheckpointError,
    checkpoints_folder,
    list_checkpoints,
    read_state,
)
from ray_diffsynth.training.data.opening import check_data
from ray_diffsynth.training.identity import check_chosen
from ray_diffsynth.training.optim import customized
from ray_diffsynth.training.ray.elastic import Watch, wait_for_room
from ray_diffsynth.training.ray.failure import WorkerError, is_lost_connection, reason
from ray_diffsynth.training.ray.worker import (
    POLL_SECONDS,
    Collector,
    RayRuntime,
    SamplerActor,
    messages_to_driver,
)
from ray_diffsynth.training.report.metrics_log import TrainingProgress
from ray_diffsynth.training.report.sample_grids import GridInfo, is_drawn
from ray_diffsynth.training.report.sample_prompts import SamplePrompt, plan_samples
from ray_diffsynth.training.report.summary import write_training_report
from ray_diffsynth.training.report.trackers import check_trackers, fallback
from ray_diffsynth.training.result import TrainResult, merged
from ray_diffsynth.training.start import Start
from ray_diffsynth.training.trainer import train

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failures in a row without a new checkpoint between them, after which a run gives up."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a run that SIGTERM ended before its last step: the same command goes on."""
_ENVIRONMENT = ("DIFFSYNTH_", "HF_", "WANDB_", "MLFLOW_", "AWS_", "GOOGLE_")
"""Beginnings of the names of variables that the workers get from the driver, where they have none of their own."""


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
    start = Start.of(config)
    if start.chosen is not None:
        check_chosen(plan, start.chosen, start.resume)
    check_files(config, going_on=start.goes_on or start.chosen is not None)
    check_data(plan)
    start.begin()
    plan = replace(plan, config=replace(config, resume="auto"))
    # In this order: Ray sets a handler of its own when it starts.
    with ray_session(config.ray_address, verbose=config.verbose), sigterm() as terminated:
        group = worker_group(config, joined_cluster(), _virtual_ranks(config.output_path))
        result, workers = _fit_until_done(plan, group, samples, terminated)
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


def absolute_paths(config: TrainConfig) -> TrainConfig:
    """Ray's workers run in another folder: everything that is a path here is made one from the root."""
    names = ("dataset_base_path", "dataset_metadata_path", "output_path", "preset_lora_path")
    changes: dict[str, Any] = {name: absolute(value) for name in names if (value := getattr(config, name))}
    for name in ("model", "tokenizer_path", "processor_path"):
        value = getattr(config, name)
        if value and Path(value).exists():  # else a hub id
            changes[name] = absolute(value)
    if config.lora_checkpoint:
        changes["lora_checkpoint"] = ",".join(absolute(path) for path in config.lora_checkpoints.values())
    if config.resume not in ("auto", "never"):
        changes["resume"] = absolute(config.resume)
    return replace(config, **changes)


def check_files(config: TrainConfig, *, going_on: bool) -> None:
    """Raise the UserErrors of LoRA files, trackers and an optimizer that a worker would raise after Ray has started.

    A run that is `going_on` may have left the LoRA that it started from behind.
    """
    start = () if going_on else config.lora_checkpoints.values()
    for path in filter(None, (config.preset_lora_path, *start)):
        check_lora_file(path)
    check_trackers(config)
    if told := fallback(config):
        logger.info(told)
    if config.customized_optimizer:
        customized(config.customized_optimizer, config)


def _virtual_ranks(output_path: str) -> int | None:
    """Virtual ranks of the run that is gone on with; None for a new one."""
    for name in reversed(list_checkpoints(output_path)):
        try:
            return int(read_state(join(checkpoints_folder(output_path), name))["position"]["lanes"])
        except CheckpointError:
            continue  # the loop names it when it passes it over
    return None


def _fit_until_done(
    plan: TrainPlan, group: WorkerGroup, samples: list[SamplePrompt], terminated: threading.Event
) -> tuple[TrainResult, int]:
    """Train, with another group of workers whenever one is lost or another number fits; also the last group's size."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    collector = Collector.options(scheduling_strategy=on_this_node()).remote(environment)  # type: ignore[attr-defined]
    sampler = _sampler(plan, group, samples, collector)
    arguments = {
        "plan": plan,
        "collector": collector,
        "sampler": sampler,
        "samples": [] if sampler is not None else samples,
        "folder": os.getcwd(),
    }
    failures, workers, results = 0, group.most, list[TrainResult]()
    with _progress_bar(collector):
        while not terminated.is_set():
            workers = wait_for_room(group, terminated.is_set, ask=bool(failures or results))
            if not workers:
                break
            before = list_checkpoints(plan.output_path)
            ray.get(collector.begin.remote())
            with Watch(collector, group, workers, terminated) as watch:
                try:
                    _fit(arguments, group, workers)
                except ray.train.TrainingFailedError as error:
                    if (told := reason(worker_failures(error))) is not None:
                        raise told from error
                    failures = failures + 1 if list_checkpoints(plan.output_path) == before else 1
                    if failures >= MAX_FAILURES:
                        raise
                    logger.warning("a worker was lost (%s); going on from the newest checkpoint", first_line(error))
                    continue
            failures = 0
            results.append(TrainResult(**ray.get(collector.result.remote())))
            if results[-1].finished or watch.regroup is None:
                break
            logger.warning("%s: going on from step %d", watch.regroup, results[-1].steps)
        if sampler is not None and results and results[-1].finished:
            _end_sampler(sampler)
        of_prompts: list[list[str]] = ray.get(collector.warnings.remote())
    if sampler is not None:
        ray.kill(sampler)
    ray.kill(collector)
    if not results:
        raise SystemExit(TERMINATED)  # asked to end before there was anything to report
    result = merged(results)
    return replace(result, warnings=[*result.warnings, *of_prompts]), workers


def _fit(arguments: dict[str, Any], group: WorkerGroup, workers: int) -> None:
    plan: TrainPlan = arguments["plan"]
    gpu = bool(group.resources.get("GPU"))
    _Trainer(
        _worker,
        train_loop_config=arguments,
        # NCCL refuses two workers on one GPU.
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if group.resources.get("GPU", 0) >= 1 else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker=dict(group.resources)
        ),
        # Each failure comes back here, also workers that find no room: Ray would try that group again for ever.
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=plan.output_path,
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    ).fit()


def _sampler(plan: TrainPlan, group: WorkerGroup, samples: list[SamplePrompt], collector: Any = None) -> Any:
    """The actor that makes sample images; None if there are none, or the workers draw them."""
    if not samples:
        return None
    wanted = sampler_resources(plan.config.sample_resources, group, joined_cluster())
    if wanted is None:
        logger.info("no GPU is left for the sample images: the workers draw them between steps, which takes time")
        return None
    cpu, gpu = wanted.pop("CPU", 0.0), wanted.pop("GPU", 0.0)
    options = SamplerActor.options(  # type: ignore[attr-defined]
        num_cpus=cpu, num_gpus=gpu, resources=wanted or None
    )
    fresh = not list_checkpoints(plan.output_path)
    start = fresh or not is_drawn(plan.output_path, 0, GridInfo.of(plan.config, samples, 0))
    if not start:  # all that it draws comes with the weights of a step
        plan = replace(plan, config=replace(plan.config, lora_checkpoint=None))
    actor = options.remote(plan, samples, start, collector)
    if start:
        actor.begin.remote()  # beside the start of the workers
    return actor


def _end_sampler(sampler: Any) -> None:
    """Wait for the last images; it logs itself what went wrong with any, but not that it is lost."""
    try:
        ray.get(sampler.finish.remote())
    except ray.exceptions.RayError as lost:
        logger.warning("the sample images ended early: %s", first_line(lost))


class _Trainer(ray.train.torch.TorchTrainer):
    """Leaves Ctrl-C to this program: Ray Train's handler would end the process with a code of its own, and stay."""

    def _register_sigint_handler(self, controller: Any) -> None:
        return


def _worker(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    if os.path.isdir(arguments["folder"]):  # relative paths inside options mean the driver's folder
        os.chdir(arguments["folder"])
    for name, value in ray.get(arguments["collector"].environment.remote()).items():
        os.environ.setdefault(name, value)
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
