"""The process group of Ray Train's workers, made after these have their variables."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchConfig

_TorchBackend: Any = TorchConfig().backend_cls


class ProcessGroup(_TorchBackend):
    """Ray Train's own, a step later."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Set the variables in the workers, then make the group."""
        if backend_config.environment is not None:
            worker_group.execute(backend_config.environment.apply)
        super().on_start(worker_group, backend_config)
