"""One group of workers by Ray Train, from its start to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch

from ray_diffsynth.cluster.environment import Environment, Parcel
from ray_diffsynth.cluster.workers import WorkerGroup
from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.training.ray.backend import BackendConfig

GRACE_SECONDS = 60.0
"""How long workers go on after the node of one, that was announced to be taken away, is gone."""


def fit(
    worker: Callable[[dict[str, Parcel]], None],
    arguments: dict[str, Any],
    group: WorkerGroup,
    workers: int,
    environment: Environment | None = None,
    starting: Callable[[], None] = lambda: None,
) -> None:
    """Start the workers, each of which runs `worker`, and wait for their end. Raises what Ray Train raises.

    starting: called when Ray Train is about to ask for their machines.
    """
    plan: TrainPlan = arguments["plan"]
    gpu = bool(group.resources.get("GPU"))
    trainer = _Trainer(
        worker,
        train_loop_config={"arguments": Parcel(environment, arguments)},
        # NCCL refuses two workers on one GPU.
        torch_config=BackendConfig(
            backend="nccl" if group.resources.get("GPU", 0) >= 1 else "gloo", environment=environment
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=gpu,
            resources_per_worker=dict(group.resources),
            label_selector=dict(group.selector) or None,
        ),
        # Each failure comes back here, also workers that find no room: Ray would try that group again for ever.
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=plan.output_path,
            failure_config=ray.train.FailureConfig(
                max_failures=0,
                controller_failure_limit=0,
                max_preemption_failures=0,
                # Ray ends all workers when a node's notice is over: the others may still be writing a checkpoint then.
                preemption_grace_s=GRACE_SECONDS,
            ),
        ),
    )
    trainer.starting = starting
    if threading.current_thread() is not threading.main_thread():  # where Ray Train says nothing of its controller
        starting()
    trainer.fit()


class _Trainer(ray.train.torch.TorchTrainer):
    """Leaves Ctrl-C to this program: Ray Train's handler would end the process with a code of its own, and stay."""

    starting: Callable[[], None]

    def _register_sigint_handler(self, controller: Any) -> None:
        # Until its process is up, which takes seconds, nobody but the run itself keeps the machines from being taken
        # away as idle; from now on Ray Train does, and two who ask would get twice as many.
        ray.get(controller.__ray_ready__.remote())
        self.starting()
