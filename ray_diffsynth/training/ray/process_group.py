"""The process group of Ray Train's workers, made after these have their variables."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any

import ray.train.torch.config as ray_train
import ray.util
from ray.train.torch import TorchConfig

_TorchBackend: Any = TorchConfig().backend_cls


class ProcessGroup(_TorchBackend):
    """Ray Train's own, a step later; on a Ray that listens on loopback alone it does so too."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Set the variables in the workers, then make the group."""
        if backend_config.environment is not None:
            worker_group.execute(backend_config.environment.apply)
        worker_group.execute(_keep_gloo_on_loopback)
        original, ray_train.get_address_and_port = ray_train.get_address_and_port, _address_and_port
        try:
            super().on_start(worker_group, backend_config)
        finally:
            ray_train.get_address_and_port = original


_stores: list[Any] = []
"""Those that this process has opened: they are there until it ends."""


def _on_loopback() -> bool:
    return ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback


def _keep_gloo_on_loopback() -> None:
    """In a worker: Gloo listens where the host's name leads, unless it is told a network."""
    if _on_loopback():
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)


def _address_and_port() -> tuple[str, int]:
    """In the first worker: where the others find torch's store.

    Torch opens it on all addresses. On loopback it is opened here instead, for torch to find it there: one process has
    one store a port (`multi_tenant`).
    """
    from ray.train._internal.utils import get_address_and_port
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = get_address_and_port()
    if _on_loopback():
        listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        port = listener.getsockname()[1]
        _stores.append(TCPStore(address, port, is_master=True, multi_tenant=True, master_listen_fd=listener.detach()))
    return address, port
