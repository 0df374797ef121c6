"""How Ray Train's workers make their process group: once they have the variables that NCCL and torch read.

Ray Train sends the configuration to the workers before that, so this module imports no torch by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray.train.backend

from ray_diffsynth.cluster.environment import Environment


@dataclass
class BackendConfig(ray.train.backend.BackendConfig):
    """What `ray.train.torch.TorchConfig` is, for workers that set the variables of `environment` first."""

    backend: str
    environment: Environment | None = None
    init_method: str = "env"
    timeout_s: int = 1800

    def _of_ray(self) -> Any:
        from ray.train.torch import TorchConfig

        return TorchConfig(backend=self.backend, init_method=self.init_method, timeout_s=self.timeout_s)

    @property
    def backend_cls(self) -> type[Any]:
        """What makes the process group."""
        from ray_diffsynth.training.ray.process_group import ProcessGroup

        return ProcessGroup

    @property
    def train_func_context(self) -> Any:
        """What is around the function that trains."""
        return self._of_ray().train_func_context

    @property
    def framework(self) -> Any:
        """Ray Train's name of torch."""
        return self._of_ray().framework

    def to_dict(self) -> dict[str, Any]:
        """What Ray Train notes of it."""
        found: dict[str, Any] = self._of_ray().to_dict()
        return found
