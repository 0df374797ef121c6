"""Training on a Ray cluster: the loop in the workers of a TorchTrainer, going on after crashes from our checkpoints.

The checkpoints in the output path are the truth. Ray Train starts the workers and the process group; when they die, the
next attempt begins at the newest checkpoint, and so does the same command run again.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.data.storage import absolute, is_remote, join
from ray_diffsynth.errors import UserError
from ray_diffsynth.ray_session import ClusterError, cluster_devices, ray_session
from ray_diffsynth.training import local
from ray_diffsynth.training.checkpoint import (
    CheckpointError,
    checkpoints_folder,
    list_checkpoints,
    prepare_resume,
    read_state,
)
from ray_diffsynth.training.loop import TrainResult, train
from ray_diffsynth.training.metrics import TrainingProgress
from ray_diffsynth.training.setup import Setup
from ray_diffsynth.training.summary import finish

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failures in a row without a new checkpoint between them, after which a run gives up."""
_ENVIRONMENT = ("DIFFSYNTH_MODEL_BASE_PATH", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")


def run(config: TrainConfig) -> dict[str, Any]:
    """Train as configured; returns what report.json holds. Under torchrun it trains in that process, without Ray."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return local.run(config)
    started = time.monotonic()
    config = absolute_paths(config)
    Setup.of(config)  # every error of configuration comes here, before Ray starts
    prepare_resume(config.output_path, config.resume)
    config = replace(config, resume="auto")
    with ray_session(config.ray_address, verbose=config.verbose):
        scaling = scaling_config(config)
        result = _fit_until_done(config, scaling)
    assert isinstance(scaling.num_workers, int)
    return finish(config, result, workers=scaling.num_workers, seconds=time.monotonic() - started)


def absolute_paths(config: TrainConfig) -> TrainConfig:
    """Ray's workers run in another folder: everything that is a path here is made one from the root."""
    names = ("dataset_base_path", "dataset_metadata_path", "output_path", "lora_checkpoint", "preset_lora_path")
    changes: dict[str, Any] = {name: absolute(value) for name in names if (value := getattr(config, name))}
    for name in ("model", "tokenizer_path", "processor_path"):
        value = getattr(config, name)
        if value and Path(value).exists():  # else a hub id
            changes[name] = absolute(value)
    if config.resume not in ("auto", "never"):
        changes["resume"] = absolute(config.resume)
    return replace(config, **changes)


def scaling_config(config: TrainConfig) -> ray.train.ScalingConfig:
    """Workers and what each reserves: a GPU each where there are some, else a share of a node's CPUs.

    Raises ClusterError when they do not fit the cluster, which would wait for ever.
    """
    cpus, gpus = cluster_devices()
    wanted = dict(config.resources or {})
    gpu = wanted.pop("GPU", 1.0 if gpus >= 1 else 0.0)
    workers = config.num_workers or (max(1, int(gpus // gpu)) if gpu else 1)
    lanes = _lanes(config.output_path)
    if lanes is not None and lanes < workers:
        logger.warning("the run was started with %d lanes, so %d workers go on with it, not %d", lanes, lanes, workers)
        workers = lanes
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    share = max(nodes) // math.ceil(workers / len(nodes))
    cpu = wanted.pop("CPU", 1.0 if gpu else max(1.0, share))
    if workers * gpu > gpus or workers * cpu > cpus:
        raise ClusterError(
            f"{workers} workers of {cpu:g} CPU and {gpu:g} GPU do not fit a cluster of {cpus:g} CPU and {gpus:g} GPU; "
            "lower --num_workers or --resources"
        )
    resources = {"CPU": cpu, **({"GPU": gpu} if gpu else {}), **wanted}
    return ray.train.ScalingConfig(num_workers=workers, use_gpu=bool(gpu), resources_per_worker=resources)


def _lanes(output_path: str) -> int | None:
    """Lanes of the run that is gone on with; None for a new one."""
    for name in reversed(list_checkpoints(output_path)):
        try:
            return int(read_state(join(checkpoints_folder(output_path), name))["position"]["lanes"])
        except CheckpointError:
            continue  # the loop names it when it passes it over
    return None


def _fit_until_done(config: TrainConfig, scaling: ray.train.ScalingConfig) -> TrainResult:
    collector = _Collector.remote()  # type: ignore[attr-defined]
    arguments = {
        "config": config,
        "collector": collector,
        "folder": os.getcwd(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }
    storage = config.output_path if is_remote(config.output_path) else str(Path(config.output_path).absolute())
    failures = 0
    with _shown(collector):
        while True:
            before = list_checkpoints(config.output_path)
            trainer = ray.train.torch.TorchTrainer(
                _worker,
                train_loop_config=arguments,
                torch_config=ray.train.torch.TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
                scaling_config=scaling,
                run_config=ray.train.RunConfig(name="ray", storage_path=storage),
            )
            try:
                trainer.fit()
                break
            except ray.train.TrainingFailedError as error:
                if (known := _user_error(error)) is not None:
                    raise known from error
                failures = failures + 1 if list_checkpoints(config.output_path) == before else 1
                if failures >= MAX_FAILURES:
                    raise
                logger.warning("a worker was lost (%s); going on from the newest checkpoint", _first_line(error))
    result = ray.get(collector.result.remote())
    ray.kill(collector)
    return TrainResult(**result)


def _worker(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    if os.path.isdir(arguments["folder"]):  # relative paths inside options mean the driver's folder
        os.chdir(arguments["folder"])
    for name, value in arguments["environment"].items():
        os.environ.setdefault(name, value)
    context = RayContext(arguments["collector"])
    result = train(arguments["config"], context)
    if context.world_rank == 0:
        ray.get(context.collector.finish.remote(result.to_dict()))


class RayContext:
    """A worker of Ray Train."""

    def __init__(self, collector: Any) -> None:
        context = ray.train.get_context()
        self.world_rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.collector = collector

    def report(self, metrics: Mapping[str, Any]) -> None:
        # Not ray.train.report: it makes all the workers wait for each other.
        self.collector.add.remote(dict(metrics))

    def stop_requested(self) -> bool:
        return False


@ray.remote(num_cpus=0)
class _Collector:
    """Carries metrics and the result from rank 0 to the driver."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] | None = None
        self._result: dict[str, Any] | None = None

    def add(self, metrics: dict[str, Any]) -> None:
        self._latest = metrics

    def take(self) -> dict[str, Any] | None:
        latest, self._latest = self._latest, None
        return latest

    def finish(self, result: dict[str, Any]) -> None:
        self._result = result

    def result(self) -> dict[str, Any]:
        if self._result is None:
            raise RuntimeError("the workers ended without a result")
        return self._result


@contextmanager
def _shown(collector: Any, interval: float = 0.5) -> Iterator[None]:
    """A progress line from what `collector` gets, while the block runs."""
    progress, ended = TrainingProgress(), threading.Event()

    def show() -> None:
        over = False
        while not over:
            over = ended.wait(interval)
            metrics = ray.get(collector.take.remote())
            if metrics is not None:
                progress.update(metrics)

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        progress.close()


def _user_error(error: BaseException) -> UserError | None:
    """The UserError that a worker raised, out of Ray's wrappers."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        for candidate in (failure, getattr(failure, "cause", None)):
            if isinstance(candidate, UserError):
                return candidate
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
