"""The process group of Ray Train's workers, made when they have the variables that NCCL and torch read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig

from ray_diffsynth.cluster.environment import Environment, Shipped

_TorchBackend: Any = TorchConfig().backend_cls


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        if backend_config.environment is not None:
            worker_group.execute(backend_config.environment.apply)
        super().on_start(worker_group, backend_config)


@dataclass
class BackendConfig(Shipped, TorchConfig):
    """`TorchConfig` whose workers get their variables first: before they unpack it, which imports torch."""

    environment: Environment | None = None

    @property
    def backend_cls(self) -> type[_Backend]:
        """What makes the process group."""
        return _Backend
